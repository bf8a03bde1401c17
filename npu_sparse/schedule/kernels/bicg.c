// The two products of a biconjugate gradient step: s := A^T r and q := A p.

void init_bicg(int m, int n, double A[n][m], double s[m], double q[n], double p[m], double r[n])
{
    for (int i = 0; i < n; i++) {
        r[i] = i % 17 / 17.0;
        q[i] = 0.0;
        for (int j = 0; j < m; j++)
            A[i][j] = (2 * i + j) % 41 / 41.0;
    }
    for (int j = 0; j < m; j++) {
        p[j] = j % 19 / 19.0;
        s[j] = 0.0;
    }
}

void kernel_bicg(int m, int n, double A[n][m], double s[m], double q[n], double p[m], double r[n])
{
#pragma scop live_out(s, q)
    for (int j = 0; j < m; j++)
        s[j] = 0.0;
    for (int i = 0; i < n; i++) {
        q[i] = 0.0;
        for (int j = 0; j < m; j++) {
            s[j] += r[i] * A[i][j];
            q[i] += A[i][j] * p[j];
        }
    }
#pragma endscop
}
