// Cholesky factor of a symmetric positive definite matrix, in the lower triangle of A: A = L L^T.
#include <math.h>

void init_cholesky(int n, double A[n][n])
{
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)  // symmetric, and each diagonal element exceeds the rest of its row
            A[i][j] = i == j ? n : 1.0 / (1 + (i + j) % 7 + (i > j ? i - j : j - i) % 5);
}

void kernel_cholesky(int n, double A[n][n])
{
#pragma scop live_out(A)
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < i; j++) {
            for (int k = 0; k < j; k++)
                A[i][j] -= A[i][k] * A[j][k];
            A[i][j] /= A[j][j];
        }
        for (int k = 0; k < i; k++)
            A[i][i] -= A[i][k] * A[i][k];
        A[i][i] = sqrt(A[i][i]);
    }
#pragma endscop
}
