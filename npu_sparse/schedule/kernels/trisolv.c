// A lower triangular system: L x = b.

void init_trisolv(int n, double L[n][n], double x[n], double b[n])
{
    for (int i = 0; i < n; i++) {
        b[i] = 1.0 + i % 9 / 9.0;
        x[i] = 0.0;
        for (int j = 0; j < n; j++)
            L[i][j] = j < i ? (i + 2 * j) % 17 / 17.0 : i == j ? n : -999.0;
    }
}

void kernel_trisolv(int n, double L[n][n], double x[n], double b[n])
{
#pragma scop live_out(x)
    for (int i = 0; i < n; i++) {
        x[i] = b[i];
        for (int j = 0; j < i; j++)
            x[i] -= L[i][j] * x[j];
        x[i] /= L[i][i];
    }
#pragma endscop
}
