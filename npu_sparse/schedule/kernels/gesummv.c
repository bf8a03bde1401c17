// The sum of two products: y := alpha A x + beta B x.

void init_gesummv(int n, double alpha, double beta, double A[n][n], double B[n][n], double Ax[n], double x[n], double y[n])
{
    for (int i = 0; i < n; i++) {
        x[i] = i % 9 / 9.0;
        y[i] = 0.0;
        Ax[i] = 0.0;
        for (int j = 0; j < n; j++) {
            A[i][j] = (i + 2 * j) % 31 / 31.0;
            B[i][j] = (2 * i + j) % 37 / 37.0;
        }
    }
}

void kernel_gesummv(int n, double alpha, double beta, double A[n][n], double B[n][n], double Ax[n], double x[n], double y[n])
{
#pragma scop live_out(y)
    for (int i = 0; i < n; i++) {
        Ax[i] = 0.0;
        y[i] = 0.0;
        for (int j = 0; j < n; j++) {
            Ax[i] += A[i][j] * x[j];
            y[i] += B[i][j] * x[j];
        }
        y[i] = alpha * Ax[i] + beta * y[i];
    }
#pragma endscop
}
