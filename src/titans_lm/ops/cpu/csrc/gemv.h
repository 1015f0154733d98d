// Products of few rows with a matrix that is read once, from memory: what decoding consists of. The reads run ahead of the
// arithmetic, for a matrix that comes from memory in small pieces takes several times as long.

#pragma once
#include <algorithm>

#include "matmul.h"

constexpr long AHEAD = 8192;  // bytes

#if defined(__AVX512F__)
constexpr int SUMS = 16, LINEAR_ROWS = 8;  // vectors of sums; rows of x that a pass over the matrix takes
#else
constexpr int SUMS = 8, LINEAR_ROWS = 4;
#endif

template <class T>
inline T sum_of(V<T> v) {
    T parts[WIDTH<T>];
    store(parts, v);
#pragma GCC unroll 4
    for (int half = WIDTH<T> / 2; half; half /= 2)
        for (int a = 0; a < half; ++a) parts[a] += parts[a + half];
    return parts[0];
}

// y[m, n] = w[n] . x[m], for M rows of x and N rows of w. `ldx`, `ldy`: scalars from one row to the next.
template <class T, int M, int N>
inline void linear_tile(long in, const T* x, long ldx, const T* w, T* y, long ldy) {
    V<T> sum[M][N] = {};
    long k = 0;
    for (; k + WIDTH<T> <= in; k += WIDTH<T>) {
        V<T> column[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            __builtin_prefetch(reinterpret_cast<const char*>(w + n * in + k) + AHEAD);
            column[n] = load(w + n * in + k);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            V<T> value = load(x + m * ldx + k);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sum[m][n] += value * column[n];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            T total = sum_of<T>(sum[m][n]);
            for (long i = k; i < in; ++i) total += x[m * ldx + i] * w[n * in + i];
            y[m * ldy + n] = total;
        }
}

// `linear_tile` for one row of each: several sums, so that a product does not wait for the one before it.
template <class T>
inline T linear_element(long in, const T* x, const T* w) {
    constexpr int N = 4;
    V<T> sum[N] = {};
    long k = 0;
    for (; k + N * WIDTH<T> <= in; k += N * WIDTH<T>)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            __builtin_prefetch(reinterpret_cast<const char*>(w + k + n * WIDTH<T>) + AHEAD);
            sum[n] += load(x + k + n * WIDTH<T>) * load(w + k + n * WIDTH<T>);
        }
    for (; k + WIDTH<T> <= in; k += WIDTH<T>) sum[0] += load(x + k) * load(w + k);
    T total = sum_of<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; k < in; ++k) total += x[k] * w[k];
    return total;
}

// y [M, out] = x W^T, W [out, in], the layout of a linear layer's weight.
template <class T, int M>
void linear_rows(long in, long out, const T* x, long ldx, const T* w, T* y, long ldy) {
    if constexpr (M == 1) {
        for (long n = 0; n < out; ++n) y[n] = linear_element(in, x, w + n * in);
        return;
    }
    constexpr int N = M <= 2 ? 4 : M <= 4 ? SUMS / 4 : SUMS == 16 ? 3 : 1;
    long n = 0;
    for (; n + N <= out; n += N) linear_tile<T, M, N>(in, x, ldx, w + n * in, y + n, ldy);
    for (; n < out; ++n) linear_tile<T, M, 1>(in, x, ldx, w + n * in, y + n, ldy);
}

template <class T, int M = LINEAR_ROWS>
void linear_last_rows(long rows, long in, long out, const T* x, long ldx, const T* w, T* y, long ldy) {
    if constexpr (M > 0) {
        if (rows == M)
            linear_rows<T, M>(in, out, x, ldx, w, y, ldy);
        else
            linear_last_rows<T, M - 1>(rows, in, out, x, ldx, w, y, ldy);
    }
}

// y [rows, out] = x W^T, for any number of rows.
template <class T>
void linear(long rows, long in, long out, const T* x, long ldx, const T* w, T* y, long ldy) {
    for (; rows > 0; rows -= LINEAR_ROWS, x += LINEAR_ROWS * ldx, y += LINEAR_ROWS * ldy)
        linear_last_rows<T>(std::min<long>(rows, LINEAR_ROWS), in, out, x, ldx, w, y, ldy);
}

// y[j] = sum_i x[i] M[i, j], for N vectors of columns, U rows at a time; M's rows are `out` apart.
template <class T, int N, int U>
inline void columns_of(long in, long out, const T* x, const T* m, T* y) {
    V<T> sum[U][N] = {};
    long i = 0;
    for (; i + U <= in; i += U, m += U * out)
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) {
                sum[u][n] += x[i + u] * load(m + u * out + n * WIDTH<T>);
            }
    for (; i < in; ++i, m += out)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sum[0][n] += x[i] * load(m + n * WIDTH<T>);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
        V<T> total = sum[0][n];
#pragma GCC unroll 16
        for (int u = 1; u < U; ++u) total += sum[u][n];
        store(y + n * WIDTH<T>, total);
    }
}

// y [out] = x [in] M [in, out]
template <class T>
void vector_times_matrix(long in, long out, const T* __restrict x, const T* __restrict m, T* __restrict y) {
    constexpr long ALL = SUMS * WIDTH<T>, FOUR = 4 * WIDTH<T>;
    long j = 0;
    for (; j + ALL <= out; j += ALL) columns_of<T, SUMS, 1>(in, out, x, m + j, y + j);
    for (; j + FOUR <= out; j += FOUR) columns_of<T, 4, SUMS / 4>(in, out, x, m + j, y + j);
    for (; j + WIDTH<T> <= out; j += WIDTH<T>) columns_of<T, 1, 4>(in, out, x, m + j, y + j);
    if (j == out) return;
    std::fill(y + j, y + out, T(0));
    for (long i = 0; i < in; ++i)
        for (long column = j; column < out; ++column) y[column] += x[i] * m[i * out + column];
}
