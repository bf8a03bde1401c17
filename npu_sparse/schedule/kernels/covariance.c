// Covariance matrix of m variables from n observations, one per row of data; data is centred in place.

void init_covariance(int m, int n, double data[n][m], double cov[m][m], double mean[m])
{
    for (int i = 0; i < n; i++)
        for (int j = 0; j < m; j++)
            data[i][j] = (i * (j + 3) + 2 * j) % 101 / 101.0 + i % 7;
    for (int i = 0; i < m; i++) {
        mean[i] = 0.0;
        for (int j = 0; j < m; j++)
            cov[i][j] = 0.0;
    }
}

void kernel_covariance(int m, int n, double data[n][m], double cov[m][m], double mean[m])
{
    double count = n;
#pragma scop live_out(cov)
    for (int j = 0; j < m; j++) {
        mean[j] = 0.0;
        for (int i = 0; i < n; i++)
            mean[j] += data[i][j];
        mean[j] /= count;
    }
    for (int i = 0; i < n; i++)
        for (int j = 0; j < m; j++)
            data[i][j] -= mean[j];
    for (int i = 0; i < m; i++)
        for (int j = i; j < m; j++) {
            cov[i][j] = 0.0;
            for (int k = 0; k < n; k++)
                cov[i][j] += data[k][i] * data[k][j];
            cov[i][j] /= count - 1.0;
            cov[j][i] = cov[i][j];
        }
#pragma endscop
}
