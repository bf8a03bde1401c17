// Symmetric rank-2m update of a lower triangle: C := beta C + alpha (A B^T + B A^T).

void init_syr2k(int n, int m, double alpha, double beta, double C[n][n], double A[n][m], double B[n][m])
{
    for (int i = 0; i < n; i++) {
        for (int k = 0; k < m; k++) {
            A[i][k] = (2 * i + k) % 23 / 23.0;
            B[i][k] = (i + 5 * k) % 19 / 19.0;
        }
        for (int j = 0; j < n; j++)
            C[i][j] = (i + 3 * j) % 29 / 29.0;
    }
}

void kernel_syr2k(int n, int m, double alpha, double beta, double C[n][n], double A[n][m], double B[n][m])
{
#pragma scop live_out(C)
    for (int i = 0; i < n; i++) {
        for (int j = 0; j <= i; j++)
            C[i][j] *= beta;
        for (int k = 0; k < m; k++)
            for (int j = 0; j <= i; j++)
                C[i][j] += alpha * A[j][k] * B[i][k] + alpha * B[j][k] * A[i][k];
    }
#pragma endscop
}
