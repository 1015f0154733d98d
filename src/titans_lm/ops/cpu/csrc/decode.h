// One token of one row and head: eqs. 10 to 15 as rank-one updates. Each scalar of the state is read and written once.

#pragma once
#include <cstdint>

#include "gemv.h"
#include "mlp.h"
#include "scan_args.h"

#if !defined(__clang__) && defined(__AVX__)
#include <immintrin.h>
#endif

// A new state of more bytes than this would not be in a core's cache when it is read again.
constexpr long STREAM_BYTES = 1 << 20;

// Store past the caches, where the machine can, so that the old values are not fetched first. x is aligned to a vector.
template <class T>
inline void store_streaming(T* x, V<T> v) {
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

// Update W, S -> W', S' [in, out] by a token with gradient x g, and compute y = h W'.
template <bool STREAM, class T>
void write_and_read(long in, long out, T theta, T eta, T retain, const T* __restrict x, const T* __restrict g,
                    const T* __restrict h, const T* __restrict w, const T* __restrict s, T* __restrict new_w,
                    T* __restrict new_s, T* __restrict y) {
    std::fill_n(y, out, T(0));
    for (long i = 0; i < in; ++i, w += out, s += out, new_w += out, new_s += out) {
        T step = theta * x[i], read = h[i];
        long j = 0;
        for (; j + WIDTH<T> <= out; j += WIDTH<T>) {
            V<T> momentum = eta * load(s + j) - step * load(g + j), weight = retain * load(w + j) + momentum;
            if constexpr (STREAM) {
                store_streaming(new_s + j, momentum);
                store_streaming(new_w + j, weight);
            } else {
                store(new_s + j, momentum);
                store(new_w + j, weight);
            }
            store(y + j, load(y + j) + read * weight);
        }
        for (; j < out; ++j) {
            new_s[j] = eta * s[j] - step * g[j];
            new_w[j] = retain * w[j] + new_s[j];
            y[j] += read * new_w[j];
        }
    }
}

template <class T>
struct TokenDecoder {
    std::vector<long> widths;
    Activation activation;
    std::vector<std::vector<T>> x, z, g, act_derivative;
    std::vector<T> h, y;
    InnerLoss<T> inner_loss;
    bool streams_state;

    TokenDecoder(const long* sizes, long layers, Activation activation, T clip, long rows)
        : widths(sizes, sizes + layers + 1), activation(activation), inner_loss(sizes[layers], clip) {
        long numbers = 0;
        for (long l = 0; l < layers; ++l) numbers += 2 * rows * widths[l] * widths[l + 1];
        streams_state = numbers * long(sizeof(T)) > STREAM_BYTES;
        long widest = 0;
        for (long l = 0; l < layers; ++l) {
            long in = leading_dim<T>(widths[l]), out = leading_dim<T>(widths[l + 1]);
            x.emplace_back(in);
            for (auto* each : {&z, &g, &act_derivative}) each->emplace_back(out);
            widest = std::max({widest, in, out});
        }
        h.resize(widest);
        y.resize(widest);
    }

    static bool is_aligned(const T* rows, long columns) {
        return reinterpret_cast<std::uintptr_t>(rows) % VECTOR_BYTES == 0 && columns % WIDTH<T> == 0;
    }

    // Run the key forward and backward at the anchor.
    void key_pass(const T* k, const T* shift, const T* const* anchor) {
        long last = widths.size() - 2;
        std::copy_n(k, widths[0], x[0].data());
        for (long l = 0; l <= last; ++l) {
            vector_times_matrix(widths[l], widths[l + 1], x[l].data(), anchor[l], z[l].data());
            if (l < last)
                activate<T>(activation, 1, widths[l + 1], z[l].data(), 0, x[l + 1].data(), act_derivative[l].data(),
                            {});
        }
        inner_loss.forward(z[last].data(), shift);
        for (long i = 0; i < widths[last + 1]; ++i) g[last][i] = inner_loss.gradient[i] * inner_loss.factor();
        for (long l = last; l; --l) {
            linear<T>(1, widths[l + 1], widths[l], g[l].data(), 0, anchor[l], g[l - 1].data(), 0);
            for (long i = 0; i < widths[l]; ++i) g[l - 1][i] *= act_derivative[l - 1][i];
        }
    }

    T gradient_norm() const {
        T sum = 0;
        for (size_t l = 0; l < x.size(); ++l)
            sum += dot(x[l].data(), x[l].data(), widths[l]) * dot(g[l].data(), g[l].data(), widths[l + 1]);
        return std::sqrt(sum);
    }

    // After `key_pass`: write the token, and read the new weights with q. `y` is the MLP's output.
    void write(const T* q, T theta, T eta, T retain, const T* const* w, const T* const* s, T* const* new_w,
               T* const* new_s) {
        std::copy_n(q, widths[0], h.data());
        for (size_t l = 0; l < x.size(); ++l) {
            if (l) activate<T>(activation, 1, widths[l], y.data(), 0, h.data(), {}, {});
            auto write = streams_state && is_aligned(new_w[l], widths[l + 1]) && is_aligned(new_s[l], widths[l + 1])
                             ? write_and_read<true, T>
                             : write_and_read<false, T>;
            write(widths[l], widths[l + 1], theta, eta, retain, x[l].data(), g[l].data(), h.data(), w[l], s[l],
                  new_w[l], new_s[l], y.data());
        }
    }

    // Read the weights with q, and write nothing. `y` is the MLP's output.
    void read(const T* q, const T* const* w) {
        std::copy_n(q, widths[0], h.data());
        for (size_t l = 0; l < x.size(); ++l) {
            if (l) activate<T>(activation, 1, widths[l], y.data(), 0, h.data(), {}, {});
            vector_times_matrix(widths[l], widths[l + 1], h.data(), w[l], y.data());
        }
    }
};

// A token's tokens of one row and head, `[widths]`, and its gates.
template <class T>
struct HeadToken {
    const T *q, *k, *v;
    T theta, eta, alpha;
};

// Decode one token of each row. Args has the sizes, options and state pointers of `ScanArgs`.
template <class T, class Args = ScanArgs<T>>
struct RowDecoder {
    const Args& args;
    TokenDecoder<T> decoder;
    std::vector<T> shift;
    std::vector<const T*> anchor, w, s;
    std::vector<T*> new_w, new_s;

    explicit RowDecoder(const Args& args)
        : args(args),
          decoder(args.widths, args.layers, Activation(args.activation), args.clip, args.batch * args.heads),
          shift(args.widths[args.layers]), anchor(args.layers), w(args.layers), s(args.layers), new_w(args.layers),
          new_s(args.layers) {}

    // Write the token, and store what it reads. `weight` and `bias` are the residual form's, of this head, or null.
    void decode(long r, const HeadToken<T>& token, const T* weight, const T* bias, T* y) {
        point_at(r);
        T theta = find_gradient(r, token, weight, bias);
        decoder.write(token.q, theta, token.eta, 1 - token.alpha, w.data(), s.data(), new_w.data(), new_s.data());
        store_outputs(token.q, weight, bias, y);
    }

    // Run the key pass at the anchor, and store the surprise. Returns theta, 0 for a token that is not written.
    T find_gradient(long r, const HeadToken<T>& token, const T* weight, const T* bias) {
        long out = args.widths[args.layers];
        for (long j = 0; j < out; ++j) shift[j] = weight ? token.k[j] - token.v[j] + bias[j] : -token.v[j];
        decoder.inner_loss.weight = weight;
        decoder.key_pass(token.k, shift.data(), anchor.data());
        if (args.surprise) args.loss[r] = decoder.inner_loss.loss, args.gradient_norm[r] = decoder.gradient_norm();
        bool written = !args.has_threshold || decoder.inner_loss.loss > T(args.threshold);
        return written ? token.theta : T(0);
    }

    // Store what q reads of the weights, and write nothing.
    void read(long r, const T* q, const T* weight, const T* bias, T* y) {
        point_at(r);
        decoder.read(q, w.data());
        store_outputs(q, weight, bias, y);
    }

    void point_at(long r) {
        for (long l = 0; l < args.layers; ++l) {
            long first = r * args.widths[l] * args.widths[l + 1];
            w[l] = args.w[l] + first;
            if (!args.anchor) continue;
            anchor[l] = args.anchor[l] + first, s[l] = args.s[l] + first;
            new_w[l] = args.new_w[l] + first, new_s[l] = args.new_s[l] + first;
        }
    }

    void store_outputs(const T* q, const T* weight, const T* bias, T* y) {
        long out = shift.size();
        if (!weight) {
            std::copy_n(decoder.y.data(), out, y);
            return;
        }
        decoder.inner_loss.norm.forward(decoder.y.data());
        for (long j = 0; j < out; ++j) y[j] = q[j] + decoder.inner_loss.norm.normed[j] * weight[j] + bias[j];
    }
};

// A row's token of `titans_decode`.
template <class T>
void decode_row(const ScanArgs<T>& args, RowDecoder<T>& row, long r) {
    long in = args.widths[0], out = args.widths[args.layers];
    HeadToken<T> token{args.q + r * in, args.k + r * in, args.v + r * out, args.theta[r], args.eta[r], args.alpha[r]};
    const T *weight = args.weight ? args.weight + r * out : nullptr, *bias = weight ? args.bias + r * out : nullptr;
    row.decode(r, token, weight, bias, args.y + r * out);
}
