// Matrix products for matrices that fit a core's caches, and their parts: vectors, rows, transposes.
//
// A matrix's rows are `leading_dim(columns)` scalars apart. The padding after the last column has no meaning: products
// compute it too, sums over rows leave it out.

#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ROWS = 8;  // ROWS x 2 vectors of sums, 2 of B and one number of A fit the registers
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, ROWS = 6;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, ROWS = 8;
#else
constexpr int VECTOR_BYTES = 16, ROWS = 6;
#endif

template <class T>
struct Vector {
    typedef T type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class T>
using V = typename Vector<T>::type;
template <class T>
constexpr int WIDTH = VECTOR_BYTES / sizeof(T);

template <class T>
inline V<T> load(const T* x) {
    V<T> v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

template <class T>
inline void store(T* x, V<T> v) {
    std::memcpy(x, &v, sizeof v);
}

// Scalars from one row to the next: whole vectors, and no multiple of 256 bytes, where rows would share cache sets.
template <class T>
long leading_dim(long columns) {
    long whole = (columns + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>;
    return whole * sizeof(T) % 256 ? whole : whole + WIDTH<T>;
}

// ---------------------------------------------------------------------------------------------------------- products

enum class Triangle { all, lower, upper };  // of A: lower is 0 above the diagonal, upper 0 below

template <class T>
struct Term {  // A B: element (i, p) of A is a[i * row + p * step], so A^T needs no copy; B [k, n] has rows ldb apart
    const T* a;
    long row, step;
    const T* b;
    long ldb, k;
    Triangle part = Triangle::all;
};

// The matrix that a product is added to: one of these.
template <class T>
struct Zero {
    V<T> at(long, long) const { return V<T>{}; }
};

template <class T>
struct Scaled {  // r P, one factor for all
    const T *p, *r;
    long ld;
    V<T> at(long i, long j) const { return load(p + i * ld + j) * *r; }
};

template <class T>
struct ScaledSum {  // r1 P1 + r2 P2, one factor each
    const T *p1, *r1, *p2, *r2;
    long ld;
    V<T> at(long i, long j) const { return load(p1 + i * ld + j) * *r1 + load(p2 + i * ld + j) * *r2; }
};

template <class T>
struct RowScaledSum {  // r1 * P1 + r2 * P2, a factor for each row
    const T *p1, *r1, *p2, *r2;
    long ld;
    V<T> at(long i, long j) const { return load(p1 + i * ld + j) * r1[i] + load(p2 + i * ld + j) * r2[i]; }
};

template <class T, int M, int N, int TERMS, class Start>
inline void tile(const Term<T> (&terms)[TERMS], const Start& start, long i0, long j0, T* c, long ldc) {
    V<T> sum[M][N];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) sum[i][j] = start.at(i0 + i, j0 + j * WIDTH<T>);
    for (const Term<T>& term : terms) {
        long first = term.part == Triangle::upper ? i0 : 0;
        long end = term.part == Triangle::lower && i0 + M < term.k ? i0 + M : term.k;
        const T* a[M];
        for (int i = 0; i < M; ++i) a[i] = term.a + (i0 + i) * term.row;
        const T* b = term.b + first * term.ldb + j0;
#pragma GCC unroll 2
        for (long p = first; p < end; ++p, b += term.ldb) {
            V<T> x[N];
            for (int j = 0; j < N; ++j) x[j] = load(b + j * WIDTH<T>);
            for (int i = 0; i < M; ++i)
                for (int j = 0; j < N; ++j) sum[i][j] += x[j] * a[i][p * term.step];
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) store(c + (i0 + i) * ldc + j0 + j * WIDTH<T>, sum[i][j]);
}

template <class T, int N, int TERMS, class Start, int M = ROWS - 1>
inline void last_rows(long rows, const Term<T> (&terms)[TERMS], const Start& start, long i0, long j0, T* c, long ldc) {
    if constexpr (M > 0) {
        if (rows == M)
            tile<T, M, N>(terms, start, i0, j0, c, ldc);
        else
            last_rows<T, N, TERMS, Start, M - 1>(rows, terms, start, i0, j0, c, ldc);
    }
}

template <class T, int N, int TERMS, class Start>
inline void strip(long m, const Term<T> (&terms)[TERMS], const Start& start, long j0, T* c, long ldc, Triangle wanted) {
    long i = wanted == Triangle::lower ? j0 / ROWS * ROWS : 0;
    for (; i + ROWS <= m; i += ROWS) tile<T, ROWS, N>(terms, start, i, j0, c, ldc);
    last_rows<T, N>(m - i, terms, start, i, j0, c, ldc);
}

// C [m, n] = start + the terms. C may be P1 or P2. With `wanted` lower, C may be left unchanged above the diagonal.
template <class T, int TERMS, class Start>
__attribute__((noinline)) void product(long m, long n, const Term<T> (&terms)[TERMS], const Start& start, T* c,
                                       long ldc, Triangle wanted = Triangle::all) {
    long j = 0;
    for (; j + WIDTH<T> < n; j += 2 * WIDTH<T>) strip<T, 2>(m, terms, start, j, c, ldc, wanted);
    if (j < n) strip<T, 1>(m, terms, start, j, c, ldc, wanted);
}

// ---------------------------------------------------------------------------------------------------------- transposes

template <class T>
using Index = std::conditional_t<sizeof(T) == 4, int, long long>;

// The elements I of p and q, concatenated.
template <class T, Index<T>... I>
inline V<T> shuffle(V<T> p, V<T> q, std::integer_sequence<Index<T>, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(p, q, I...);
#else
    typedef Index<T> Indices __attribute__((vector_size(VECTOR_BYTES)));
    return __builtin_shuffle(p, q, Indices{I...});
#endif
}

template <class T, int APART, int SHIFT, class = std::make_integer_sequence<Index<T>, WIDTH<T>>>
struct Exchanged;
template <class T, int APART, int SHIFT, Index<T>... B>  // the lower row of a pair where SHIFT is 0, else the upper
struct Exchanged<T, APART, SHIFT, std::integer_sequence<Index<T>, B...>> {
    typedef std::integer_sequence<Index<T>, (B & APART ? WIDTH<T> + B - APART + SHIFT : B + SHIFT)...> type;
};

// Transpose a square of vectors: rows `APART` from one another exchange off-diagonal parts, then those twice as far.
template <class T, int APART = 1>
inline void exchange(V<T> (&v)[WIDTH<T>]) {
    if constexpr (APART < WIDTH<T>) {
#pragma GCC unroll 16
        for (int a = 0; a < WIDTH<T>; ++a)
            if (!(a & APART)) {
                V<T> p = v[a], q = v[a + APART];
                v[a] = shuffle<T>(p, q, typename Exchanged<T, APART, 0>::type{});
                v[a + APART] = shuffle<T>(p, q, typename Exchanged<T, APART, APART>::type{});
            }
        exchange<T, 2 * APART>(v);
    }
}

// y [columns, rows] = x^T, in squares as wide as a vector.
template <class T>
void transpose(long rows, long columns, const T* x, long ldx, T* y, long ldy) {
    constexpr int W = WIDTH<T>;
    for (long i = 0; i < rows; i += W)
        for (long j = 0; j < columns; j += W) {
            V<T> v[W];
            for (int a = 0; a < W; ++a) v[a] = i + a < rows ? load(x + (i + a) * ldx + j) : V<T>{};
            exchange<T>(v);
            for (int a = 0; a < W && j + a < columns; ++a) store(y + (j + a) * ldy + i, v[a]);
        }
}

// -------------------------------------------------------------------------------------------------------------- rows

template <class T>
inline T dot(const T* x, const T* y, long n) {
    V<T> sums = {};
    long i = 0;
    for (; i + WIDTH<T> <= n; i += WIDTH<T>) sums += load(x + i) * load(y + i);
    T sum = 0;
    for (int a = 0; a < WIDTH<T>; ++a) sum += sums[a];
    for (; i < n; ++i) sum += x[i] * y[i];
    return sum;
}

template <class T>
inline T mean(const T* x, long n) {
    V<T> sums = {};
    long i = 0;
    for (; i + WIDTH<T> <= n; i += WIDTH<T>) sums += load(x + i);
    T sum = 0;
    for (int a = 0; a < WIDTH<T>; ++a) sum += sums[a];
    for (; i < n; ++i) sum += x[i];
    return sum / n;
}

template <class T>
inline void copy_rows(long rows, long columns, const T* x, long ldx, T* y, long ldy) {
    for (long i = 0; i < rows; ++i) std::memcpy(y + i * ldy, x + i * ldx, columns * sizeof(T));
}

// y = scale * x, a factor for each row.
template <class T>
inline void scale_rows(long rows, long columns, const T* scale, const T* x, T* y, long ld) {
    for (long i = 0; i < rows; ++i)
        for (long j = 0; j < columns; ++j) y[i * ld + j] = scale[i] * x[i * ld + j];
}

// z = x * y
template <class T>
inline void multiply(long rows, long columns, const T* x, const T* y, T* z, long ld) {
    for (long i = 0; i < rows; ++i)
        for (long j = 0; j < columns; ++j) z[i * ld + j] = x[i * ld + j] * y[i * ld + j];
}

// z = x + y
template <class T>
inline void add(long rows, long columns, const T* x, const T* y, T* z, long ld) {
    for (long i = 0; i < rows; ++i)
        for (long j = 0; j < columns; ++j) z[i * ld + j] = x[i * ld + j] + y[i * ld + j];
}

// z += x * y
template <class T>
inline void add_product(long rows, long columns, const T* x, const T* y, T* z, long ld) {
    for (long i = 0; i < rows; ++i)
        for (long j = 0; j < columns; ++j) z[i * ld + j] += x[i * ld + j] * y[i * ld + j];
}
