// Means of nine neighbours in the plane, in place (Gauss-Seidel).

void init_seidel_2d(int tsteps, int n, double A[n][n])
{
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            A[i][j] = (7 * i + 3 * j) % 17 / 17.0;
}

void kernel_seidel_2d(int tsteps, int n, double A[n][n])
{
#pragma scop live_out(A)
    for (int t = 0; t < tsteps; t++)
        for (int i = 1; i < n - 1; i++)
            for (int j = 1; j < n - 1; j++)
                A[i][j] = (A[i - 1][j - 1] + A[i - 1][j] + A[i - 1][j + 1] + A[i][j - 1] + A[i][j] + A[i][j + 1] +
                           A[i + 1][j - 1] + A[i + 1][j] + A[i + 1][j + 1]) / 9.0;
#pragma endscop
}
