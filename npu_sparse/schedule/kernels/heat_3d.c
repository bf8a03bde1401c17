// The heat equation in space, explicit steps with second differences; a time step goes from A to B and another one back.

void init_heat_3d(int tsteps, int n, double A[n][n][n], double B[n][n][n])
{
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            for (int k = 0; k < n; k++) {
                A[i][j][k] = (i * j + 3 * k) % 17 * 10.0 / n;  // a field that is not yet steady
                B[i][j][k] = A[i][j][k];
            }
}

void kernel_heat_3d(int tsteps, int n, double A[n][n][n], double B[n][n][n])
{
#pragma scop live_out(A, B)
    for (int t = 0; t < tsteps; t++) {
        for (int i = 1; i < n - 1; i++)
            for (int j = 1; j < n - 1; j++)
                for (int k = 1; k < n - 1; k++)
                    B[i][j][k] = A[i][j][k] + 0.125 * (A[i - 1][j][k] - 2.0 * A[i][j][k] + A[i + 1][j][k]) +
                                 0.125 * (A[i][j - 1][k] - 2.0 * A[i][j][k] + A[i][j + 1][k]) +
                                 0.125 * (A[i][j][k - 1] - 2.0 * A[i][j][k] + A[i][j][k + 1]);
        for (int i = 1; i < n - 1; i++)
            for (int j = 1; j < n - 1; j++)
                for (int k = 1; k < n - 1; k++)
                    A[i][j][k] = B[i][j][k] + 0.125 * (B[i - 1][j][k] - 2.0 * B[i][j][k] + B[i + 1][j][k]) +
                                 0.125 * (B[i][j - 1][k] - 2.0 * B[i][j][k] + B[i][j + 1][k]) +
                                 0.125 * (B[i][j][k - 1] - 2.0 * B[i][j][k] + B[i][j][k + 1]);
    }
#pragma endscop
}
