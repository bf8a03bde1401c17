// Nussinov's folding of an RNA sequence: the most base pairs in every interval, by dynamic programming over intervals.
#define MAX(a, b) ((a) >= (b) ? (a) : (b))
#define PAIR(a, b) ((a) + (b) == 3 ? 1 : 0)  // bases are 0 to 3, and complements add up to 3

void init_nussinov(int n, int base[n], int best[n][n])
{
    for (int i = 0; i < n; i++) {
        base[i] = (i + i / 3 + i / 7) % 4;
        for (int j = 0; j < n; j++)
            best[i][j] = 0;
    }
}

void kernel_nussinov(int n, int base[n], int best[n][n])
{
#pragma scop live_out(best)
    for (int i = n - 1; i >= 0; i--)
        for (int j = i + 1; j < n; j++) {
            if (j >= 1)
                best[i][j] = MAX(best[i][j], best[i][j - 1]);
            if (i + 1 < n)
                best[i][j] = MAX(best[i][j], best[i + 1][j]);
            if (j >= 1 && i + 1 < n) {
                if (i < j - 1)
                    best[i][j] = MAX(best[i][j], best[i + 1][j - 1] + PAIR(base[i], base[j]));
                else
                    best[i][j] = MAX(best[i][j], best[i + 1][j - 1]);
            }
            for (int k = i + 1; k < j; k++)
                best[i][j] = MAX(best[i][j], best[i][k] + best[k + 1][j]);
        }
#pragma endscop
}
