// Two matrix products: D := beta D + (alpha A B) C, through AB = alpha A B.

void init_2mm(int ni, int nj, int nk, int nl, double alpha, double beta, double AB[ni][nj], double A[ni][nk],
              double B[nk][nj], double C[nj][nl], double D[ni][nl])
{
    for (int i = 0; i < ni; i++) {
        for (int k = 0; k < nk; k++)
            A[i][k] = (i + 3 * k) % 19 / 19.0;
        for (int j = 0; j < nj; j++)
            AB[i][j] = 0.0;
        for (int l = 0; l < nl; l++)
            D[i][l] = (2 * i + l) % 7 / 7.0;
    }
    for (int k = 0; k < nk; k++)
        for (int j = 0; j < nj; j++)
            B[k][j] = (k + j) % 23 / 23.0;
    for (int j = 0; j < nj; j++)
        for (int l = 0; l < nl; l++)
            C[j][l] = (5 * j + l) % 29 / 29.0;
}

void kernel_2mm(int ni, int nj, int nk, int nl, double alpha, double beta, double AB[ni][nj], double A[ni][nk],
                double B[nk][nj], double C[nj][nl], double D[ni][nl])
{
#pragma scop live_out(D)
    for (int i = 0; i < ni; i++)
        for (int j = 0; j < nj; j++) {
            AB[i][j] = 0.0;
            for (int k = 0; k < nk; k++)
                AB[i][j] += alpha * A[i][k] * B[k][j];
        }
    for (int i = 0; i < ni; i++)
        for (int l = 0; l < nl; l++) {
            D[i][l] *= beta;
            for (int j = 0; j < nj; j++)
                D[i][l] += AB[i][j] * C[j][l];
        }
#pragma endscop
}
