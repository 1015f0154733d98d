// What a memory reads: from projections the short convolution, SiLU, and for queries and keys the unit; and back.
// `features.py` says the same in PyTorch.

#pragma once
#include "mlp.h"

// Fields are those of `features._Features`, in its order. Channels are parts * heads * width; parts are q, k and v, or
// the first of them.
template <class T>
struct Features {
    long batch, tokens, size, parts, heads, width, threads;
    const T *past, *filters;  // [B, size - 1 + T, channels], [channels, size]
    T* const* made;           // of each part, [B, T, H, width]
    const T* const* by_made;  // back alone, as all that follows
    T *by_past, *by_filters;
};

constexpr double UNIT_EPS = 1e-6;
constexpr long BLOCK = 64;  // tokens: a sum of sums rounds less than one of all tokens

// One part's one head at a time: nothing that another writes.
template <class T>
struct Maker {
    const Features<T>& call;
    std::vector<T> taps, by_taps, by_taps_here;  // [size, width]: filters of the head, gradient by them, and of a block
    std::vector<T> before, value, slope, by;     // of a token: what SiLU is of, SiLU, its slope; the gradient
    long part = 0, head = 0, channels, first = 0;

    explicit Maker(const Features<T>& call)
        : call(call), taps(call.size * call.width), by_taps(taps), by_taps_here(taps), before(leading<T>(call.width)),
          value(before), slope(before), by(before), channels(call.parts * call.heads * call.width) {}

    void begin(long job) {
        part = job / call.heads, head = job % call.heads;
        first = job * call.width;
        for (long i = 0; i < call.width; ++i)
            for (long age = 0; age < call.size; ++age)
                taps[age * call.width + i] = call.filters[(first + i) * call.size + age];
    }

    long at(long b, long t) const { return ((b * call.tokens + t) * call.heads + head) * call.width; }
    long past_at(long b, long t) const { return (b * (call.size - 1 + call.tokens) + t) * channels + first; }

    // The token's value before its unit; its length's inverse, or 1.
    T token(long b, long t, bool for_back) {
        const T* past = call.past + past_at(b, t);
        for (long i = 0; i < call.width; ++i) before[i] = past[i] * taps[i];
        for (long age = 1; age < call.size; ++age)
            for (long i = 0; i < call.width; ++i) before[i] += past[age * channels + i] * taps[age * call.width + i];
        T* slopes = for_back ? slope.data() : nullptr;
        activate<T>(Activation::silu, 1, call.width, before.data(), 0, value.data(), slopes, {});
        if (part == 2) return 1;
        return 1 / std::sqrt(dot(value.data(), value.data(), call.width) + T(UNIT_EPS));
    }

    void make(long job) {
        begin(job);
        for (long b = 0; b < call.batch; ++b)
            for (long t = 0; t < call.tokens; ++t) {
                T scale = token(b, t, false), *made = call.made[part] + at(b, t);
                for (long i = 0; i < call.width; ++i) made[i] = value[i] * scale;
            }
    }

    void back(long job) {
        begin(job);
        for (auto* sums : {&by_taps, &by_taps_here}) std::fill(sums->begin(), sums->end(), T(0));
        for (long b = 0; b < call.batch; ++b) {
            for (long t = 0; t < call.size - 1 + call.tokens; ++t)
                std::fill_n(call.by_past + past_at(b, t), call.width, T(0));
            for (long t = 0; t < call.tokens; ++t) {
                back_token(b, t);
                if (t % BLOCK == BLOCK - 1) collect();
            }
            collect();
        }
        for (long i = 0; i < call.width; ++i)
            for (long age = 0; age < call.size; ++age)
                call.by_filters[(first + i) * call.size + age] = by_taps[age * call.width + i];
    }

    void collect() {
        for (size_t i = 0; i < by_taps.size(); ++i) by_taps[i] += by_taps_here[i], by_taps_here[i] = 0;
    }

    void back_token(long b, long t) {
        T scale = token(b, t, true), along = 0;
        const T* by_made = call.by_made[part] + at(b, t);
        if (part != 2) along = dot(by_made, value.data(), call.width) * scale * scale;
        for (long i = 0; i < call.width; ++i) by[i] = (by_made[i] - value[i] * along) * scale * slope[i];
        for (long age = 0; age < call.size; ++age) {
            const T *past = call.past + past_at(b, t + age), *tap = &taps[age * call.width];
            T *by_past = call.by_past + past_at(b, t + age), *by_tap = &by_taps_here[age * call.width];
            for (long i = 0; i < call.width; ++i) {
                by_past[i] += by[i] * tap[i];
                by_tap[i] += by[i] * past[i];
            }
        }
    }
};
