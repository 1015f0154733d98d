// One token of one row and head of a memory that is held in factors (`ops/factored.py`): the weights and the momentum as they
// were some tokens ago, and the outer products that were written since,
//
//     W = kept * base_w + from_s * base_s - sum_k in_w[k] x_k^T g_k
//     S = decay * base_s                  - sum_k in_s[k] x_k^T g_k
//
// A token then reads base_w and base_s, and writes vectors alone. Where a chunk begins, or no slot is left, the products are
// added to base_w and base_s (`fold`), which changes neither W nor S.

#pragma once
#include "decode.h"

// The coefficients of a row and head: these, then in_s and in_w of each slot.
enum Coefficient : long { COUNT, KEPT, FROM_S, DECAY, ANCHORED, SLOTS };  // ANCHORED: the anchor is base_w

// w, s [in, out] of one layer with `count` products of x [slots, in] and g [slots, out] added. `scaled` has room for 2 * count.
template <class T>
void fold_layer(long in, long out, long count, long slots, const T* c, const T* __restrict x, const T* __restrict g,
                T* __restrict w, T* __restrict s, T* __restrict scaled) {
    const T kept = c[KEPT], from_s = c[FROM_S], decay = c[DECAY], *in_s = c + SLOTS, *in_w = in_s + slots;
    constexpr long N = 4, BLOCK = N * WIDTH<T>;
    for (long i = 0; i < in; ++i, w += out, s += out) {
        for (long k = 0; k < count; ++k)
            scaled[2 * k] = in_w[k] * x[k * in + i], scaled[2 * k + 1] = in_s[k] * x[k * in + i];
        long j = 0;
        for (; j + BLOCK <= out; j += BLOCK) {
            V<T> new_w[N], new_s[N];
            for (long n = 0; n < N; ++n) {
                V<T> old = load(s + j + n * WIDTH<T>);
                new_w[n] = kept * load(w + j + n * WIDTH<T>) + from_s * old;
                new_s[n] = decay * old;
            }
            for (long k = 0; k < count; ++k)
                for (long n = 0; n < N; ++n) {
                    V<T> gradient = load(g + k * out + j + n * WIDTH<T>);
                    new_w[n] -= scaled[2 * k] * gradient;
                    new_s[n] -= scaled[2 * k + 1] * gradient;
                }
            for (long n = 0; n < N; ++n) store(w + j + n * WIDTH<T>, new_w[n]), store(s + j + n * WIDTH<T>, new_s[n]);
        }
        for (; j < out; ++j) {
            T new_w = kept * w[j] + from_s * s[j], new_s = decay * s[j];
            for (long k = 0; k < count; ++k)
                new_w -= scaled[2 * k] * g[k * out + j], new_s -= scaled[2 * k + 1] * g[k * out + j];
            w[j] = new_w, s[j] = new_s;
        }
    }
}

// Args has the fields of `LayerStepArgs`.
template <class T, class Args>
struct FactoredDecoder : RowDecoder<T, Args> {
    using Base = RowDecoder<T, Args>;
    using Base::args, Base::decoder;
    std::vector<T> scaled, part;
    std::vector<T*> base_w, base_s, base_anchor, x, g;

    explicit FactoredDecoder(const Args& args)
        : Base(args), scaled(2 * args.slots), part(decoder.y.size()), base_w(args.layers), base_s(args.layers),
          base_anchor(args.layers), x(args.layers), g(args.layers) {}

    long size() const { return SLOTS + 2 * args.slots; }

    void decode(long r, const HeadToken<T>& token, const T* weight, const T* bias, T* y) {
        point_at_factors(r);
        bool begins = args.position[r / args.heads] == 0;
        T* before = args.coefficients + r * size();
        if (begins || long(before[COUNT]) == args.slots) fold(before, begins);
        for (long l = 0; l < args.layers; ++l) this->anchor[l] = before[ANCHORED] ? base_w[l] : base_anchor[l];
        T theta = this->find_gradient(r, token, weight, bias);
        T* after = args.new_coefficients + r * size();
        append(before, after, theta, token.eta, 1 - token.alpha);
        read_factors(token.q, after);
        this->store_outputs(token.q, weight, bias, y);
    }

    void point_at_factors(long r) {
        for (long l = 0; l < args.layers; ++l) {
            long in = args.widths[l], out = args.widths[l + 1];
            base_w[l] = args.w[l] + r * in * out, base_s[l] = args.s[l] + r * in * out;
            base_anchor[l] = args.anchor[l] + r * in * out;
            x[l] = args.x_factors[l] + r * args.slots * in, g[l] = args.g_factors[l] + r * args.slots * out;
        }
    }

    // Add the products to the base. `begins`: a chunk begins here, so the anchor becomes W. Written in place, because W, S
    // and the anchor stay what they are.
    void fold(T* c, bool begins) {
        for (long l = 0; l < args.layers; ++l) {
            long in = args.widths[l], out = args.widths[l + 1], count = c[COUNT];
            if (!begins && c[ANCHORED]) std::copy_n(base_w[l], in * out, base_anchor[l]);
            if (count) fold_layer<T>(in, out, count, args.slots, c, x[l], g[l], base_w[l], base_s[l], scaled.data());
        }
        std::fill_n(c, size(), T(0));
        c[KEPT] = c[DECAY] = 1, c[ANCHORED] = begins;
    }

    // Store the token's product in the next slot, and compute the coefficients after it (eqs. 10, 13).
    void append(const T* before, T* after, T theta, T eta, T retain) {
        long count = before[COUNT], slots = args.slots;
        for (long l = 0; l < args.layers; ++l) {
            std::copy_n(decoder.x[l].data(), args.widths[l], x[l] + count * args.widths[l]);
            std::copy_n(decoder.g[l].data(), args.widths[l + 1], g[l] + count * args.widths[l + 1]);
        }
        std::copy_n(before, size(), after);
        after[COUNT] = count + 1;
        after[KEPT] *= retain, after[DECAY] *= eta;
        after[FROM_S] = retain * after[FROM_S] + after[DECAY];
        T *in_s = after + SLOTS, *in_w = in_s + slots;
        for (long k = 0; k < count; ++k) in_s[k] *= eta, in_w[k] = retain * in_w[k] + in_s[k];
        in_s[count] = in_w[count] = theta;
    }

    // Read W with q. `decoder.y` is the MLP's output.
    void read_factors(const T* q, const T* c) {
        long count = c[COUNT];
        const T* in_w = c + SLOTS + args.slots;
        T *h = decoder.h.data(), *y = decoder.y.data();
        std::copy_n(q, args.widths[0], h);
        for (long l = 0; l < args.layers; ++l) {
            long in = args.widths[l], out = args.widths[l + 1];
            if (l) activate<T>(decoder.activation, 1, in, y, 0, h, {}, {});
            vector_times_matrix(in, out, h, base_w[l], y);
            for (long j = 0; j < out; ++j) y[j] *= c[KEPT];
            if (c[FROM_S] != 0) {
                vector_times_matrix(in, out, h, base_s[l], part.data());
                for (long j = 0; j < out; ++j) y[j] += c[FROM_S] * part[j];
            }
            linear<T>(1, in, count, h, 0, x[l], scaled.data(), 0);
            for (long k = 0; k < count; ++k) scaled[k] *= in_w[k];
            vector_times_matrix(count, out, scaled.data(), g[l], part.data());
            for (long j = 0; j < out; ++j) y[j] -= part[j];
        }
    }
};
