// Heat on a square by alternating directions: each step solves tridiagonal systems along columns, then along rows (Thomas).

void init_adi(int tsteps, int n, double u[n][n], double v[n][n], double p[n][n], double q[n][n])
{
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            u[i][j] = (double)(i + n - j) / n;
            v[i][j] = 0.0;
            p[i][j] = 0.0;
            q[i][j] = 0.0;
        }
}

void kernel_adi(int tsteps, int n, double u[n][n], double v[n][n], double p[n][n], double q[n][n])
{
    double ratio = (double)n * n / tsteps;  // dt / dx^2 of the unit square and unit time
    double a = -ratio, b = 1.0 + 2.0 * ratio, d = -0.5 * ratio, e = 1.0 + ratio;
#pragma scop live_out(u)
    for (int t = 1; t <= tsteps; t++) {
        for (int i = 1; i < n - 1; i++) {
            v[0][i] = 1.0;
            p[i][0] = 0.0;
            q[i][0] = v[0][i];
            for (int j = 1; j < n - 1; j++) {
                p[i][j] = -a / (a * p[i][j - 1] + b);
                q[i][j] = ((1.0 + 2.0 * d) * u[j][i] - d * u[j][i - 1] - d * u[j][i + 1] - a * q[i][j - 1]) /
                          (a * p[i][j - 1] + b);
            }
            v[n - 1][i] = 1.0;
            for (int j = n - 2; j >= 1; j--)
                v[j][i] = p[i][j] * v[j + 1][i] + q[i][j];
        }
        for (int i = 1; i < n - 1; i++) {
            u[i][0] = 1.0;
            p[i][0] = 0.0;
            q[i][0] = u[i][0];
            for (int j = 1; j < n - 1; j++) {
                p[i][j] = -d / (d * p[i][j - 1] + e);
                q[i][j] = ((1.0 + 2.0 * a) * v[i][j] - a * v[i - 1][j] - a * v[i + 1][j] - d * q[i][j - 1]) /
                          (d * p[i][j - 1] + e);
            }
            u[i][n - 1] = 1.0;
            for (int j = n - 2; j >= 1; j--)
                u[i][j] = p[i][j] * u[i][j + 1] + q[i][j];
        }
    }
#pragma endscop
}
