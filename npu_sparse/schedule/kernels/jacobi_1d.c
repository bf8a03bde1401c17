// Means of three neighbours on a line, from A to B and back.

void init_jacobi_1d(int tsteps, int n, double A[n], double B[n])
{
    for (int i = 0; i < n; i++) {
        A[i] = i * 7 % 17 / 17.0;
        B[i] = i * 5 % 13 / 13.0;
    }
}

void kernel_jacobi_1d(int tsteps, int n, double A[n], double B[n])
{
#pragma scop live_out(A, B)
    for (int t = 0; t < tsteps; t++) {
        for (int i = 1; i < n - 1; i++)
            B[i] = (A[i - 1] + A[i] + A[i + 1]) / 3.0;
        for (int i = 1; i < n - 1; i++)
            A[i] = (B[i - 1] + B[i] + B[i + 1]) / 3.0;
    }
#pragma endscop
}
