// The Yule-Walker equations by Levinson-Durbin recursion: T y = -r for the Toeplitz matrix T of (1, r[0], ..., r[n - 2]).

void init_durbin(int n, double r[n], double y[n], double z[n])
{
    for (int i = 0; i < n; i++) {  // an autocorrelation that falls fast enough for T to be positive definite
        r[i] = 1.0 / (4.0 * (i + 1.0) * (i + 1.0));
        y[i] = 0.0;
        z[i] = 0.0;
    }
}

void kernel_durbin(int n, double r[n], double y[n], double z[n])
{
    double alpha, beta, sum;
#pragma scop live_out(y)
    y[0] = -r[0];
    beta = 1.0;
    alpha = -r[0];
    for (int k = 1; k < n; k++) {
        beta = (1.0 - alpha * alpha) * beta;
        sum = 0.0;
        for (int i = 0; i < k; i++)
            sum += r[k - i - 1] * y[i];
        alpha = -(r[k] + sum) / beta;
        for (int i = 0; i < k; i++)
            z[i] = y[i] + alpha * y[k - i - 1];
        for (int i = 0; i < k; i++)
            y[i] = z[i];
        y[k] = alpha;
    }
#pragma endscop
}
