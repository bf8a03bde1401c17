// Deriche's recursive smoothing of an image: causal and anticausal filters of second order along rows, then along columns.
#include <math.h>

void init_deriche(int w, int h, float alpha, float in[w][h], float out[w][h], float ahead[w][h], float back[w][h])
{
    for (int i = 0; i < w; i++)
        for (int j = 0; j < h; j++) {
            in[i][j] = (313 * i + 991 * j) % 65536 / 65535.0f;
            out[i][j] = 0.0f;
            ahead[i][j] = 0.0f;
            back[i][j] = 0.0f;
        }
}

void kernel_deriche(int w, int h, float alpha, float in[w][h], float out[w][h], float ahead[w][h], float back[w][h])
{
    float decay = expf(-alpha), x1, x2, y1, y2;
    float gain = (1.0f - decay) * (1.0f - decay) / (1.0f + 2.0f * alpha * decay - decay * decay);
    float a0 = gain, a1 = gain * decay * (alpha - 1.0f), a2 = gain * decay * (alpha + 1.0f), a3 = -gain * decay * decay;
    float b1 = 2.0f * decay, b2 = -decay * decay;
#pragma scop live_out(out)
    for (int i = 0; i < w; i++) {
        x1 = 0.0f;
        y1 = 0.0f;
        y2 = 0.0f;
        for (int j = 0; j < h; j++) {
            ahead[i][j] = a0 * in[i][j] + a1 * x1 + b1 * y1 + b2 * y2;
            x1 = in[i][j];
            y2 = y1;
            y1 = ahead[i][j];
        }
    }
    for (int i = 0; i < w; i++) {
        x1 = 0.0f;
        x2 = 0.0f;
        y1 = 0.0f;
        y2 = 0.0f;
        for (int j = h - 1; j >= 0; j--) {
            back[i][j] = a2 * x1 + a3 * x2 + b1 * y1 + b2 * y2;
            x2 = x1;
            x1 = in[i][j];
            y2 = y1;
            y1 = back[i][j];
        }
    }
    for (int i = 0; i < w; i++)
        for (int j = 0; j < h; j++)
            out[i][j] = ahead[i][j] + back[i][j];
    for (int j = 0; j < h; j++) {
        x1 = 0.0f;
        y1 = 0.0f;
        y2 = 0.0f;
        for (int i = 0; i < w; i++) {
            ahead[i][j] = a0 * out[i][j] + a1 * x1 + b1 * y1 + b2 * y2;
            x1 = out[i][j];
            y2 = y1;
            y1 = ahead[i][j];
        }
    }
    for (int j = 0; j < h; j++) {
        x1 = 0.0f;
        x2 = 0.0f;
        y1 = 0.0f;
        y2 = 0.0f;
        for (int i = w - 1; i >= 0; i--) {
            back[i][j] = a2 * x1 + a3 * x2 + b1 * y1 + b2 * y2;
            x2 = x1;
            x1 = out[i][j];
            y2 = y1;
            y1 = back[i][j];
        }
    }
    for (int i = 0; i < w; i++)
        for (int j = 0; j < h; j++)
            out[i][j] = ahead[i][j] + back[i][j];
#pragma endscop
}
