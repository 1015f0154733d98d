// Queries, keys and values from their projections: short convolution, SiLU, and for queries and keys the L2 norm; and the
// backward pass. `features.py` is the same in PyTorch.

#pragma once
#include "mlp.h"

// The fields are those of `features._FeatureArgs`, in its order. Channels are parts * heads * width; the parts are q, k and v,
// or the first of them.
template <class T>
struct FeatureArgs {
    long batch, tokens, size, parts, heads, width, threads;
    const T *past, *filters;       // [B, size - 1 + T, channels], [channels, size]
    T* const* outputs;             // of each part, [B, T, H, width]
    const T* const* grad_outputs;  // this and all that follows: for the backward pass alone
    T *grad_past, *grad_filters;
};

constexpr double UNIT_EPS = 1e-6;
constexpr long BLOCK = 64;  // tokens: a sum of sums rounds less than one sum of all tokens

// One head of one part at a time: jobs write to different memory.
template <class T>
struct FeatureWorker {
    const FeatureArgs<T>& args;
    std::vector<T> taps, grad_taps,
        block_grad_taps;  // [size, width]: filters of the head, gradient by them, and of a block
    std::vector<T> conv, value, act_derivative,
        grad_conv;  // of a token: what SiLU is of, SiLU, its slope; the gradient
    long part = 0, head = 0, channels, first = 0;

    explicit FeatureWorker(const FeatureArgs<T>& args)
        : args(args), taps(args.size * args.width), grad_taps(taps), block_grad_taps(taps),
          conv(leading_dim<T>(args.width)), value(conv), act_derivative(conv), grad_conv(conv),
          channels(args.parts * args.heads * args.width) {}

    void begin(long job) {
        part = job / args.heads, head = job % args.heads;
        first = job * args.width;
        for (long i = 0; i < args.width; ++i)
            for (long age = 0; age < args.size; ++age)
                taps[age * args.width + i] = args.filters[(first + i) * args.size + age];
    }

    long token_offset(long b, long t) const { return ((b * args.tokens + t) * args.heads + head) * args.width; }
    long past_offset(long b, long t) const { return (b * (args.size - 1 + args.tokens) + t) * channels + first; }

    // Compute the token's value before its L2 norm. Returns 1 / norm, or 1 for v.
    T token(long b, long t, bool for_back) {
        const T* past = args.past + past_offset(b, t);
        for (long i = 0; i < args.width; ++i) conv[i] = past[i] * taps[i];
        for (long age = 1; age < args.size; ++age)
            for (long i = 0; i < args.width; ++i) conv[i] += past[age * channels + i] * taps[age * args.width + i];
        T* slopes = for_back ? act_derivative.data() : nullptr;
        activate<T>(Activation::silu, 1, args.width, conv.data(), 0, value.data(), slopes, {});
        if (part == 2) return 1;
        return 1 / std::sqrt(dot(value.data(), value.data(), args.width) + T(UNIT_EPS));
    }

    void forward(long job) {
        begin(job);
        for (long b = 0; b < args.batch; ++b) forward_tokens(b, 0, args.tokens);
    }

    void forward_tokens(long b, long from, long end) {
        for (long t = from; t < end; ++t) {
            T scale = token(b, t, false), *outputs = args.outputs[part] + token_offset(b, t);
            for (long i = 0; i < args.width; ++i) outputs[i] = value[i] * scale;
        }
    }

    void backward(long job) {
        begin(job);
        for (auto* sums : {&grad_taps, &block_grad_taps}) std::fill(sums->begin(), sums->end(), T(0));
        for (long b = 0; b < args.batch; ++b) {
            for (long t = 0; t < args.size - 1 + args.tokens; ++t)
                std::fill_n(args.grad_past + past_offset(b, t), args.width, T(0));
            backward_tokens(b, 0, args.tokens);
        }
        for (long i = 0; i < args.width; ++i)
            for (long age = 0; age < args.size; ++age)
                args.grad_filters[(first + i) * args.size + age] = grad_taps[age * args.width + i];
    }

    void add_filter_gradients() {
        for (long i = 0; i < args.width; ++i)
            for (long age = 0; age < args.size; ++age)
                args.grad_filters[(first + i) * args.size + age] += grad_taps[age * args.width + i];
    }

    // Add the gradients of these tokens to those by past and, in `grad_taps`, by the filters.
    void backward_tokens(long b, long from, long end) {
        for (long t = from; t < end; ++t) {
            token_backward(b, t);
            if (t % BLOCK == BLOCK - 1) flush_block();
        }
        flush_block();
    }

    void flush_block() {
        for (size_t i = 0; i < grad_taps.size(); ++i) grad_taps[i] += block_grad_taps[i], block_grad_taps[i] = 0;
    }

    void token_backward(long b, long t) {
        T scale = token(b, t, true), along = 0;
        const T* grad_outputs = args.grad_outputs[part] + token_offset(b, t);
        if (part != 2) along = dot(grad_outputs, value.data(), args.width) * scale * scale;
        for (long i = 0; i < args.width; ++i)
            grad_conv[i] = (grad_outputs[i] - value[i] * along) * scale * act_derivative[i];
        for (long age = 0; age < args.size; ++age) {
            const T *past = args.past + past_offset(b, t + age), *tap = &taps[age * args.width];
            T *grad_past = args.grad_past + past_offset(b, t + age), *grad_tap = &block_grad_taps[age * args.width];
            for (long i = 0; i < args.width; ++i) {
                grad_past[i] += grad_conv[i] * tap[i];
                grad_tap[i] += grad_conv[i] * past[i];
            }
        }
    }
};
