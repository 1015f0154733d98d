// One token of a memory layer, between its projections and its output projection: convolution, SiLU and unit length
// (`token_features.h`), gates, the token's write and read (`decode.h`), output norm and output gate.

#pragma once
#include "decode.h"
#include "token_features.h"

// I = heads * widths[0] channels; parts are q, k and v, or q alone: then nothing is written, and all that a write needs is
// null.
template <class T>
struct LayerStepArgs {
    long batch, heads, layers, size, dim, parts, threads, activation, has_threshold, surprise;
    const long* widths;                                 // [layers + 1]
    const long *batch_strides, *token_strides;          // of each part's conv_state
    const T* x;                                         // [B, dim]
    const T *const *projected, *const *conv_state;      // of each part, [B, I], [B, size - 1, I]
    const T* const* filters;                            // of each part, [I, size]
    const T *const *gate_weights, *const *gate_biases;  // of theta, eta, alpha: [H, dim], [H]; null: a gate of 0
    const T *weight, *bias;                             // of the residual form, [H, V], or null
    const T *output_norm, *output_gate;                 // [V], [B, I]
    T *new_conv_state, *y, *loss, *gradient_norm;  // [B, size - 1, parts * I], [B, I], [B, H], the last two maybe null
    const T *const *w, *const *anchor, *const *s;  // of each layer, [B * H, in, out]
    T *const *new_w, *const *new_s;
    double clip, threshold, lr, output_eps;

    // `numbers` holds the fields one after another, arrays in place of pointers to them, in the order of
    // `compiled_step._call`; `scalars` holds the last four.
    LayerStepArgs(const long* numbers, const double* scalars) {
        for (long* field :
             {&batch, &heads, &layers, &size, &dim, &parts, &threads, &activation, &has_threshold, &surprise})
            *field = *numbers++;
        auto array = [&](auto& field, long count) {
            field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(numbers);
            numbers += count;
        };
        auto pointer = [&](auto& field) {
            field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(*numbers++);
        };
        array(widths, layers + 1), array(batch_strides, parts), array(token_strides, parts);
        pointer(x);
        array(projected, parts), array(conv_state, parts), array(filters, parts);
        array(gate_weights, 3), array(gate_biases, 3);
        pointer(weight), pointer(bias), pointer(output_norm), pointer(output_gate);
        pointer(new_conv_state), pointer(y), pointer(loss), pointer(gradient_norm);
        array(w, layers), array(anchor, layers), array(s, layers), array(new_w, layers), array(new_s, layers);
        if (parts == 1) anchor = nullptr;
        clip = scalars[0], threshold = scalars[1], lr = scalars[2], output_eps = scalars[3];
    }
};

template <class T>
inline T sigmoid(T z) {
    return 1 / (1 + std::exp(-z));
}

template <class T>
struct LayerStep {
    const LayerStepArgs<T>& args;
    RowDecoder<T, LayerStepArgs<T>> row;
    long width, channels;
    std::vector<T> conv, features[3];

    explicit LayerStep(const LayerStepArgs<T>& args)
        : args(args), row(args), width(args.widths[0]), channels(args.heads * width), conv(leading_dim<T>(width)),
          features{conv, conv, conv} {}

    void step(long r) {
        long b = r / args.heads, head = r % args.heads;
        for (long part = 0; part < args.parts; ++part) convolve(b, head, part);
        const T *q = features[0].data(), *weight = args.weight ? args.weight + head * width : nullptr;
        const T* bias = weight ? args.bias + head * width : nullptr;
        T* y = args.y + r * width;
        if (args.parts == 1) {
            row.read(r, q, weight, bias, y);
        } else {
            T theta = T(args.lr) * gate(0, b, head), eta = gate(1, b, head), alpha = gate(2, b, head);
            row.decode(r, {q, features[1].data(), features[2].data(), theta, eta, alpha}, weight, bias, y);
        }
        apply_output_gate(args.output_gate + r * width, y);
    }

    // Compute the features of one part of a head, and its state of the convolution after the token.
    void convolve(long b, long head, long part) {
        long first = head * width, past = args.size - 1, row_size = args.parts * channels;
        const T* state = args.conv_state[part] + b * args.batch_strides[part] + first;
        const T *token = args.projected[part] + b * channels + first, *taps = args.filters[part] + first * args.size;
        T* after = args.new_conv_state + b * past * row_size + part * channels + first;
        for (long i = 0; i < width; ++i) conv[i] = token[i] * taps[i * args.size + past];
        for (long age = 0; age < past; ++age, after += row_size) {
            const T *old = state + age * args.token_strides[part], *next = old + args.token_strides[part];
            for (long i = 0; i < width; ++i) conv[i] += old[i] * taps[i * args.size + age];
            std::copy_n(age + 1 < past ? next : token, width, after);
        }
        T* feature = features[part].data();
        activate<T>(Activation::silu, 1, width, conv.data(), 0, feature, {}, {});
        if (part == 2) return;
        T scale = 1 / std::sqrt(dot(feature, feature, width) + T(UNIT_EPS));
        for (long i = 0; i < width; ++i) feature[i] *= scale;
    }

    T gate(long which, long b, long head) const {
        const T* weights = args.gate_weights[which];
        if (!weights) return 0;
        return sigmoid(dot(args.x + b * args.dim, weights + head * args.dim, args.dim) + args.gate_biases[which][head]);
    }

    void apply_output_gate(const T* output_gate, T* y) const {
        T scale = 1 / std::sqrt(dot(y, y, width) / width + T(args.output_eps));
        for (long i = 0; i < width; ++i) y[i] *= scale * args.output_norm[i] * sigmoid(output_gate[i]);
    }
};
