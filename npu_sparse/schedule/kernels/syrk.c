// Symmetric rank-m update of a lower triangle: C := beta C + alpha A A^T.

void init_syrk(int n, int m, double alpha, double beta, double C[n][n], double A[n][m])
{
    for (int i = 0; i < n; i++) {
        for (int k = 0; k < m; k++)
            A[i][k] = (2 * i + k) % 23 / 23.0;
        for (int j = 0; j < n; j++)
            C[i][j] = (i + 3 * j) % 29 / 29.0;
    }
}

void kernel_syrk(int n, int m, double alpha, double beta, double C[n][n], double A[n][m])
{
#pragma scop live_out(C)
    for (int i = 0; i < n; i++) {
        for (int j = 0; j <= i; j++)
            C[i][j] *= beta;
        for (int k = 0; k < m; k++)
            for (int j = 0; j <= i; j++)
                C[i][j] += alpha * A[i][k] * A[j][k];
    }
#pragma endscop
}
