// Multiresolution analysis: A[r][q][.] := A[r][q][.] C for every r and q, in place through sum.

void init_doitgen(int nr, int nq, int np, double A[nr][nq][np], double C[np][np], double sum[np])
{
    for (int r = 0; r < nr; r++)
        for (int q = 0; q < nq; q++)
            for (int p = 0; p < np; p++)
                A[r][q][p] = (r + 2 * q + 3 * p) % 37 / 37.0;
    for (int p = 0; p < np; p++) {
        sum[p] = 0.0;
        for (int s = 0; s < np; s++)
            C[p][s] = (p + 5 * s) % 41 / 41.0;
    }
}

void kernel_doitgen(int nr, int nq, int np, double A[nr][nq][np], double C[np][np], double sum[np])
{
#pragma scop live_out(A)
    for (int r = 0; r < nr; r++)
        for (int q = 0; q < nq; q++) {
            for (int p = 0; p < np; p++) {
                sum[p] = 0.0;
                for (int s = 0; s < np; s++)
                    sum[p] += A[r][q][s] * C[s][p];
            }
            for (int p = 0; p < np; p++)
                A[r][q][p] = sum[p];
        }
#pragma endscop
}
