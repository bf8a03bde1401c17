// Symmetric matrix product: C := beta C + alpha A B, where only the lower triangle of the symmetric A is stored.

void init_symm(int m, int n, double alpha, double beta, double C[m][n], double A[m][m], double B[m][n])
{
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < n; j++) {
            C[i][j] = (i + j) % 29 / 29.0;
            B[i][j] = (n + i - j) % 31 / 31.0;
        }
        for (int k = 0; k < m; k++)
            A[i][k] = k <= i ? (i + 2 * k) % 37 / 37.0 : -999.0;
    }
}

void kernel_symm(int m, int n, double alpha, double beta, double C[m][n], double A[m][m], double B[m][n])
{
    double row;
#pragma scop live_out(C)
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            row = 0.0;
            for (int k = 0; k < i; k++) {
                C[k][j] += alpha * A[i][k] * B[i][j];
                row += A[i][k] * B[k][j];
            }
            C[i][j] = beta * C[i][j] + alpha * (A[i][i] * B[i][j] + row);
        }
#pragma endscop
}
