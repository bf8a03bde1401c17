// A rank-2 update and two products: A := A + u1 v1^T + u2 v2^T, x := beta A^T y + z, w := alpha A x.

void init_gemver(int n, double alpha, double beta, double A[n][n], double u1[n], double v1[n], double u2[n], double v2[n],
                 double w[n], double x[n], double y[n], double z[n])
{
    for (int i = 0; i < n; i++) {
        u1[i] = i % 5 / 5.0;
        u2[i] = i % 7 / 14.0;
        v1[i] = i % 11 / 44.0;
        v2[i] = i % 13 / 78.0;
        y[i] = i % 17 / 136.0;
        z[i] = i % 19 / 171.0;
        x[i] = 0.0;
        w[i] = 0.0;
        for (int j = 0; j < n; j++)
            A[i][j] = (i + j) % 23 / 23.0;
    }
}

void kernel_gemver(int n, double alpha, double beta, double A[n][n], double u1[n], double v1[n], double u2[n], double v2[n],
                   double w[n], double x[n], double y[n], double z[n])
{
#pragma scop live_out(w)
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            A[i][j] = A[i][j] + u1[i] * v1[j] + u2[i] * v2[j];
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            x[i] += beta * A[j][i] * y[j];
    for (int i = 0; i < n; i++)
        x[i] += z[i];
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            w[i] += alpha * A[i][j] * x[j];
#pragma endscop
}
