// QR decomposition by modified Gram-Schmidt: A = Q R, Q with orthonormal columns, R upper triangular. A is overwritten.
#include <math.h>

void init_gramschmidt(int m, int n, double A[m][n], double R[n][n], double Q[m][n])
{
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            A[i][j] = (i == j ? 10.0 : 0.0) + (3 * i + 7 * j + i * j % 5) % 31 / 31.0;
            Q[i][j] = 0.0;
        }
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            R[i][j] = 0.0;
}

void kernel_gramschmidt(int m, int n, double A[m][n], double R[n][n], double Q[m][n])
{
    double square;
#pragma scop live_out(R, Q)
    for (int k = 0; k < n; k++) {
        square = 0.0;
        for (int i = 0; i < m; i++)
            square += A[i][k] * A[i][k];
        R[k][k] = sqrt(square);
        for (int i = 0; i < m; i++)
            Q[i][k] = A[i][k] / R[k][k];
        for (int j = k + 1; j < n; j++) {
            R[k][j] = 0.0;
            for (int i = 0; i < m; i++)
                R[k][j] += Q[i][k] * A[i][j];
            for (int i = 0; i < m; i++)
                A[i][j] -= Q[i][k] * R[k][j];
        }
    }
#pragma endscop
}
