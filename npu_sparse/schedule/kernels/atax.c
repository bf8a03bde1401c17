// Matrix transposed times vector: y := A^T (A x), through Ax.

void init_atax(int m, int n, double A[m][n], double x[n], double y[n], double Ax[m])
{
    for (int i = 0; i < m; i++) {
        Ax[i] = 0.0;
        for (int j = 0; j < n; j++)
            A[i][j] = (i + j) % 37 / 37.0;
    }
    for (int j = 0; j < n; j++) {
        x[j] = 1.0 + j % 13 / 13.0;
        y[j] = 0.0;
    }
}

void kernel_atax(int m, int n, double A[m][n], double x[n], double y[n], double Ax[m])
{
#pragma scop live_out(y)
    for (int j = 0; j < n; j++)
        y[j] = 0.0;
    for (int i = 0; i < m; i++) {
        Ax[i] = 0.0;
        for (int j = 0; j < n; j++)
            Ax[i] += A[i][j] * x[j];
        for (int j = 0; j < n; j++)
            y[j] += A[i][j] * Ax[i];
    }
#pragma endscop
}
