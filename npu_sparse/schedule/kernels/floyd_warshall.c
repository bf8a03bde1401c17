// Lengths of the shortest paths between all pairs of nodes, by Floyd and Warshall.

void init_floyd_warshall(int n, int path[n][n])
{
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            path[i][j] = i == j ? 0 : (7 * i + 3 * j) % 11 && (i + j) % 7 ? 999 : 1 + (i + 5 * j) % 97;
}

void kernel_floyd_warshall(int n, int path[n][n])
{
#pragma scop live_out(path)
    for (int k = 0; k < n; k++)
        for (int i = 0; i < n; i++)
            for (int j = 0; j < n; j++)
                path[i][j] = path[i][k] + path[k][j] < path[i][j] ? path[i][k] + path[k][j] : path[i][j];
#pragma endscop
}
