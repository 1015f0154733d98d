// One token of attention: its projections, rotary positions, keys and values written to their buffers, softmax attention over
// the slots in use, and the output projection.

#pragma once
#include "linears.h"

// A row of a buffer is [heads, slots, width]. `before` [B, dim] is a token without position whose keys and values come first,
// or null: MAC's retrieved token.
template <class T>
struct AttentionStepArgs {
    long batch, heads, width, dim, slots, threads,
        rope_stride;                         // rope_stride: from a row's angles to the next, maybe 0
    const T *x, *before, *cos, *sin;         // [B, dim], [B, dim], [width / 2] of each row
    T *keys, *values;                        // [B, heads, slots, width]
    T *q, *k, *v, *before_k, *before_v, *y;  // room, [B, heads * width] each
    T* output;                               // [B, dim]
    const T *q_proj, *k_proj, *v_proj, *o_proj;
    const long *slot, *end;  // [B], where the token is written (after `before`), and the slots in use then

    explicit AttentionStepArgs(const long* numbers) {
        for (long* field : {&batch, &heads, &width, &dim, &slots, &threads, &rope_stride}) *field = *numbers++;
        auto pointer = [&](auto& field) {
            field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(*numbers++);
        };
        pointer(x), pointer(before), pointer(cos), pointer(sin), pointer(keys), pointer(values);
        for (T** room : {&q, &k, &v, &before_k, &before_v, &y, &output}) pointer(*room);
        pointer(q_proj), pointer(k_proj), pointer(v_proj), pointer(o_proj);
        slot = numbers, end = numbers + batch;
    }
};

template <class T>
struct AttentionStep {
    const AttentionStepArgs<T>& args;
    std::vector<T> scores;

    explicit AttentionStep(const AttentionStepArgs<T>& args) : args(args), scores(leading_dim<T>(args.slots)) {}

    void step(long r) {
        long b = r / args.heads, width = args.width, at = r * width;
        T *keys = args.keys + r * args.slots * width, *values = args.values + r * args.slots * width;
        const T *cos = args.cos + b * args.rope_stride, *sin = args.sin + b * args.rope_stride;
        rotate(cos, sin, args.q + at), rotate(cos, sin, args.k + at);
        long slot = args.slot[b], end = args.end[b];
        if (args.before) {
            std::copy_n(args.before_k + at, width, keys + slot * width);
            std::copy_n(args.before_v + at, width, values + slot * width);
            ++slot;
        }
        std::copy_n(args.k + at, width, keys + slot * width);
        std::copy_n(args.v + at, width, values + slot * width);
        linear<T>(1, width, end, args.q + at, 0, keys, scores.data(), 0);
        softmax(end, 1 / std::sqrt(T(width)));
        vector_times_matrix(end, width, scores.data(), values, args.y + at);
    }

    void rotate(const T* cos, const T* sin, T* x) const {
        long half = args.width / 2;
        for (long i = 0; i < half; ++i) {
            T left = x[i], right = x[i + half];
            x[i] = left * cos[i] - right * sin[i];
            x[i + half] = right * cos[i] + left * sin[i];
        }
    }

    // Turn `scores` into softmax(scale * scores). What is behind them in the last vector has no meaning.
    void softmax(long count, T scale) {
        T *p = scores.data(), most = p[0], sum = 0;
        for (long i = 1; i < count; ++i) most = std::max(most, p[i]);
        for (long i = 0; i < count; i += WIDTH<T>) store(p + i, exponential<T>((load(p + i) - most) * scale));
        for (long i = 0; i < count; ++i) sum += p[i];
        for (long i = 0; i < count; ++i) p[i] /= sum;
    }
};
