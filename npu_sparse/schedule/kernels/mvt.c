// A matrix and its transpose times vectors: x1 := x1 + A y1 and x2 := x2 + A^T y2.

void init_mvt(int n, double x1[n], double x2[n], double y1[n], double y2[n], double A[n][n])
{
    for (int i = 0; i < n; i++) {
        x1[i] = i % 7 / 7.0;
        x2[i] = i % 11 / 11.0;
        y1[i] = i % 13 / 13.0;
        y2[i] = i % 17 / 17.0;
        for (int j = 0; j < n; j++)
            A[i][j] = (i + 3 * j) % 43 / 43.0;
    }
}

void kernel_mvt(int n, double x1[n], double x2[n], double y1[n], double y2[n], double A[n][n])
{
#pragma scop live_out(x1, x2)
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            x1[i] += A[i][j] * y1[j];
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            x2[i] += A[j][i] * y2[j];
#pragma endscop
}
