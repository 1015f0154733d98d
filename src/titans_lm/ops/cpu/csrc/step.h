// One token, of one row and head: eqs. 10 to 15 as rank-one updates, each number of the state read and written once.

#pragma once
#include <cstdint>

#include "call.h"
#include "mlp.h"

#if !defined(__clang__) && defined(__AVX__)
#include <immintrin.h>
#endif

constexpr long STREAMED =
    1 << 20;  // bytes: more of new state than this is gone from a core's cache when it is read again

// Past the caches, where the machine can: then the old numbers there are not fetched first. x is aligned to a vector.
template <class T>
inline void stream(T* x, V<T> v) {
#if defined(__clang__)
    __builtin_nontemporal_store(v, reinterpret_cast<V<T>*>(x));
#elif defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(x), reinterpret_cast<__m512i>(v));
#elif defined(__AVX__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(x), reinterpret_cast<__m256i>(v));
#else
    store(x, v);
#endif
}

template <class T>
void add_row(long n, T scale, const T* __restrict x, T* __restrict y) {
    for (long i = 0; i < n; ++i) y[i] += scale * x[i];
}

// y [out] = x [in] M [in, out]
template <class T>
void times(long in, long out, const T* __restrict x, const T* __restrict m, T* __restrict y) {
    std::fill_n(y, out, T(0));
    long i = 0;
    for (; i + 4 <= in; i += 4) {
        const T *m0 = m + i * out, *m1 = m0 + out, *m2 = m1 + out, *m3 = m2 + out;
        for (long j = 0; j < out; ++j) y[j] += x[i] * m0[j] + x[i + 1] * m1[j] + x[i + 2] * m2[j] + x[i + 3] * m3[j];
    }
    for (; i < in; ++i) add_row(out, x[i], m + i * out, y);
}

// W, S -> W', S' [in, out] after a token with gradient x g, and y = h W'.
template <bool STREAM, class T>
void write_and_read(long in, long out, T theta, T eta, T keep, const T* __restrict x, const T* __restrict g,
                    const T* __restrict h, const T* __restrict w, const T* __restrict s, T* __restrict new_w,
                    T* __restrict new_s, T* __restrict y) {
    std::fill_n(y, out, T(0));
    for (long i = 0; i < in; ++i, w += out, s += out, new_w += out, new_s += out) {
        T step = theta * x[i], read = h[i];
        long j = 0;
        for (; j + WIDTH<T> <= out; j += WIDTH<T>) {
            V<T> momentum = eta * load(s + j) - step * load(g + j), weight = keep * load(w + j) + momentum;
            if constexpr (STREAM) {
                stream(new_s + j, momentum);
                stream(new_w + j, weight);
            } else {
                store(new_s + j, momentum);
                store(new_w + j, weight);
            }
            store(y + j, load(y + j) + read * weight);
        }
        for (; j < out; ++j) {
            new_s[j] = eta * s[j] - step * g[j];
            new_w[j] = keep * w[j] + new_s[j];
            y[j] += read * new_w[j];
        }
    }
}

template <class T>
struct Step {
    std::vector<long> widths;
    Activation activation;
    std::vector<std::vector<T>> x, z, g, slope;
    std::vector<T> h, y;
    Top<T> top;
    bool streams;

    Step(const long* sizes, long layers, Activation activation, T clip, long rows)
        : widths(sizes, sizes + layers + 1), activation(activation), top(sizes[layers], clip) {
        long numbers = 0;
        for (long l = 0; l < layers; ++l) numbers += 2 * rows * widths[l] * widths[l + 1];
        streams = numbers * long(sizeof(T)) > STREAMED;
        long widest = 0;
        for (long l = 0; l < layers; ++l) {
            long in = leading<T>(widths[l]), out = leading<T>(widths[l + 1]);
            x.emplace_back(in);
            for (auto* each : {&z, &g, &slope}) each->emplace_back(out);
            widest = std::max({widest, in, out});
        }
        h.resize(widest);
        y.resize(widest);
    }

    static bool is_aligned(const T* rows, long columns) {
        return reinterpret_cast<std::uintptr_t>(rows) % VECTOR_BYTES == 0 && columns % WIDTH<T> == 0;
    }

    // The key, forward and back at the anchor.
    void key_pass(const T* k, const T* shift, const T* const* anchor) {
        long last = widths.size() - 2;
        std::copy_n(k, widths[0], x[0].data());
        for (long l = 0; l <= last; ++l) {
            times(widths[l], widths[l + 1], x[l].data(), anchor[l], z[l].data());
            if (l < last)
                activate<T>(activation, 1, widths[l + 1], z[l].data(), 0, x[l + 1].data(), slope[l].data(), {});
        }
        top.of(z[last].data(), shift);
        for (long i = 0; i < widths[last + 1]; ++i) g[last][i] = top.gradient[i] * top.factor();
        for (long l = last; l; --l)
            for (long i = 0; i < widths[l]; ++i)
                g[l - 1][i] = dot(anchor[l] + i * widths[l + 1], g[l].data(), widths[l + 1]) * slope[l - 1][i];
    }

    T gradient_norm() const {
        T sum = 0;
        for (size_t l = 0; l < x.size(); ++l)
            sum += dot(x[l].data(), x[l].data(), widths[l]) * dot(g[l].data(), g[l].data(), widths[l + 1]);
        return std::sqrt(sum);
    }

    // After `key_pass`: writes, and reads with q what was written. The answer, before the residual form's norm, is `y`.
    void write(const T* q, T theta, T eta, T keep, const T* const* w, const T* const* s, T* const* new_w,
               T* const* new_s) {
        std::copy_n(q, widths[0], h.data());
        for (size_t l = 0; l < x.size(); ++l) {
            if (l) activate<T>(activation, 1, widths[l], y.data(), 0, h.data(), {}, {});
            auto write = streams && is_aligned(new_w[l], widths[l + 1]) && is_aligned(new_s[l], widths[l + 1])
                             ? write_and_read<true, T>
                             : write_and_read<false, T>;
            write(widths[l], widths[l + 1], theta, eta, keep, x[l].data(), g[l].data(), h.data(), w[l], s[l], new_w[l],
                  new_s[l], y.data());
        }
    }
};

// Rows one after another, a token each.
template <class T>
struct Stepper {
    const Call<T>& call;
    Step<T> one;
    std::vector<T> shift;
    std::vector<const T*> anchor, w, s;
    std::vector<T*> new_w, new_s;

    explicit Stepper(const Call<T>& call)
        : call(call), one(call.widths, call.layers, Activation(call.activation), call.clip, call.batch * call.heads),
          shift(call.widths[call.layers]), anchor(call.layers), w(call.layers), s(call.layers), new_w(call.layers),
          new_s(call.layers) {}

    void step(long r) {
        long in = call.widths[0], out = call.widths[call.layers];
        for (long l = 0; l < call.layers; ++l) {
            long first = r * call.widths[l] * call.widths[l + 1];
            anchor[l] = call.anchor[l] + first, w[l] = call.w[l] + first, s[l] = call.s[l] + first;
            new_w[l] = call.new_w[l] + first, new_s[l] = call.new_s[l] + first;
        }
        const T *weight = call.weight ? call.weight + r * out : nullptr, *bias = call.bias + (weight ? r * out : 0);
        const T *q = call.q + r * in, *k = call.k + r * in, *v = call.v + r * out;
        for (long j = 0; j < out; ++j) shift[j] = weight ? k[j] - v[j] + bias[j] : -v[j];
        one.top.weight = weight;
        one.key_pass(k, shift.data(), anchor.data());
        if (call.surprise) call.loss[r] = one.top.loss, call.gradient_norm[r] = one.gradient_norm();
        bool written = !call.has_threshold || one.top.loss > T(call.threshold);
        T theta = written ? call.theta[r] : T(0);
        one.write(q, theta, call.eta[r], 1 - call.alpha[r], w.data(), s.data(), new_w.data(), new_s.data());
        put(q, weight, bias, call.y + r * out);
    }

    void put(const T* q, const T* weight, const T* bias, T* y) {
        long out = shift.size();
        if (!weight) {
            std::copy_n(one.y.data(), out, y);
            return;
        }
        one.top.norm.of(one.y.data());
        for (long j = 0; j < out; ++j) y[j] = q[j] + one.top.norm.n[j] * weight[j] + bias[j];
    }
};
