// A linear system by LU factors: A x = b, with L y = b and U x = y.

void init_ludcmp(int n, double A[n][n], double b[n], double x[n], double y[n])
{
    for (int i = 0; i < n; i++) {
        b[i] = 1.0 + i % 9 / 9.0;
        x[i] = 0.0;
        y[i] = 0.0;
        for (int j = 0; j < n; j++)
            A[i][j] = i == j ? n : (2 * i + 3 * j) % 17 / 17.0;
    }
}

void kernel_ludcmp(int n, double A[n][n], double b[n], double x[n], double y[n])
{
    double rest;
#pragma scop live_out(x)
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < i; j++) {
            rest = A[i][j];
            for (int k = 0; k < j; k++)
                rest -= A[i][k] * A[k][j];
            A[i][j] = rest / A[j][j];
        }
        for (int j = i; j < n; j++) {
            rest = A[i][j];
            for (int k = 0; k < i; k++)
                rest -= A[i][k] * A[k][j];
            A[i][j] = rest;
        }
    }
    for (int i = 0; i < n; i++) {
        rest = b[i];
        for (int j = 0; j < i; j++)
            rest -= A[i][j] * y[j];
        y[i] = rest;
    }
    for (int i = n - 1; i >= 0; i--) {
        rest = y[i];
        for (int j = i + 1; j < n; j++)
            rest -= A[i][j] * x[j];
        x[i] = rest / A[i][i];
    }
#pragma endscop
}
