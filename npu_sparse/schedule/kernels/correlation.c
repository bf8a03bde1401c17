// Correlation matrix of m variables from n observations, one per row of data; data is standardised in place.
#include <math.h>

void init_correlation(int m, int n, double data[n][m], double corr[m][m], double mean[m], double deviation[m])
{
    for (int i = 0; i < n; i++)
        for (int j = 0; j < m; j++)
            data[i][j] = (i * (j + 3) + 2 * j) % 101 / 101.0 + i % 7;
    for (int i = 0; i < m; i++) {
        mean[i] = 0.0;
        deviation[i] = 0.0;
        for (int j = 0; j < m; j++)
            corr[i][j] = 0.0;
    }
}

void kernel_correlation(int m, int n, double data[n][m], double corr[m][m], double mean[m], double deviation[m])
{
    double count = n, least = 0.1;  // below it a deviation counts as 1, so that a constant variable divides by no zero
#pragma scop live_out(corr)
    for (int j = 0; j < m; j++) {
        mean[j] = 0.0;
        for (int i = 0; i < n; i++)
            mean[j] += data[i][j];
        mean[j] /= count;
    }
    for (int j = 0; j < m; j++) {
        deviation[j] = 0.0;
        for (int i = 0; i < n; i++)
            deviation[j] += (data[i][j] - mean[j]) * (data[i][j] - mean[j]);
        deviation[j] = sqrt(deviation[j] / count);
        deviation[j] = deviation[j] > least ? deviation[j] : 1.0;
    }
    for (int i = 0; i < n; i++)
        for (int j = 0; j < m; j++)
            data[i][j] = (data[i][j] - mean[j]) / (sqrt(count) * deviation[j]);
    for (int i = 0; i < m - 1; i++) {
        corr[i][i] = 1.0;
        for (int j = i + 1; j < m; j++) {
            corr[i][j] = 0.0;
            for (int k = 0; k < n; k++)
                corr[i][j] += data[k][i] * data[k][j];
            corr[j][i] = corr[i][j];
        }
    }
    corr[m - 1][m - 1] = 1.0;
#pragma endscop
}
