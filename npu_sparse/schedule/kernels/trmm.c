// Triangular matrix product: B := alpha A^T B, where A is lower triangular with a unit diagonal that is not stored.

void init_trmm(int m, int n, double alpha, double A[m][m], double B[m][n])
{
    for (int i = 0; i < m; i++) {
        for (int k = 0; k < m; k++)
            A[i][k] = k < i ? (i + k) % 23 / 23.0 : -999.0;
        for (int j = 0; j < n; j++)
            B[i][j] = (n + i - j) % 31 / 31.0;
    }
}

void kernel_trmm(int m, int n, double alpha, double A[m][m], double B[m][n])
{
#pragma scop live_out(B)
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            for (int k = i + 1; k < m; k++)
                B[i][j] += A[k][i] * B[k][j];
            B[i][j] *= alpha;
        }
#pragma endscop
}
