// One token of a memory layer: projections (`linears.h`), convolution, SiLU and unit length (`token_features.h`), gates, the
// token's write and read (`decode.h`, `factored.h`), output norm, output gate and output projection.

#pragma once
#include "factored.h"
#include "linears.h"
#include "token_features.h"

// I = heads * widths[0] channels; parts are q, k and v, or q alone: then nothing is written, and all that a write needs is
// null.
template <class T>
struct LayerStepArgs {
    long batch, parts, threads, activation, has_threshold, surprise;
    long slots, chunk_size;                     // slots of a memory in factors; 0: it is whole
    const long *batch_strides, *token_strides;  // of each part's conv_state
    const T* x;                                 // [B, dim]
    const T* const* conv_state;                 // of each part, [B, size - 1, I]
    T *const *projected, *output_gate;          // of each part [B, I], and of the output gate: room, or given
    T *new_conv_state, *y;                      // [B, size - 1, parts * I], [B, I]
    T *output, *loss, *gradient_norm;           // [B, dim], [B, H], [B, H], each maybe null
    T *const *w, *const *anchor, *const *s;     // of each layer, [B * H, in, out]
    T *const *new_w, *const *new_s;             // of a whole memory
    T *const *x_factors, *const *g_factors;     // of one in factors, whose w, anchor and s are written too
    T *coefficients, *new_coefficients;         // [B * H, SLOTS + 2 * slots]
    const long* position;                       // [B]
    long* new_position;
    // What the layer always has.
    long heads, layers, size, dim;
    const long* widths;                                 // [layers + 1]
    const T* const* filters;                            // of q, k and v, [I, size]
    const T *const *gate_weights, *const *gate_biases;  // of theta, eta, alpha: [H, dim], [H]; null: a gate of 0
    const T *weight, *bias;                             // of the residual form, [H, V], or null
    const T* output_norm;                               // [V]
    const T *const *projections, *output_gate_weight;   // of q, k and v, [I, dim]; null: `projected` is given
    const T* output_projection;                         // [dim, I]; null: without it
    double clip, threshold, lr, output_eps;

    // `numbers` and `of_layer` hold the fields one after another, arrays in place of pointers to them, in the order of
    // `compiled_step`; `scalars` holds the last four.
    LayerStepArgs(const long* numbers, const long* of_layer, const double* scalars) {
        const long* at = of_layer;
        auto array = [&](auto& field, long count) {
            field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(at);
            at += count;
        };
        auto pointer = [&](auto& field) { field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(*at++); };
        for (long* field : {&heads, &layers, &size, &dim}) *field = *at++;
        array(widths, layers + 1), array(filters, 3), array(gate_weights, 3), array(gate_biases, 3);
        pointer(weight), pointer(bias), pointer(output_norm);
        array(projections, 3), pointer(output_gate_weight), pointer(output_projection);

        at = numbers;
        for (long* field : {&batch, &parts, &threads, &activation, &has_threshold, &surprise, &slots, &chunk_size})
            *field = *at++;
        array(batch_strides, parts), array(token_strides, parts);
        pointer(x), array(conv_state, parts), array(projected, parts), pointer(output_gate);
        pointer(new_conv_state), pointer(y), pointer(output), pointer(loss), pointer(gradient_norm);
        array(w, layers);
        if (parts > 1)
            array(anchor, layers), array(s, layers);
        else
            anchor = nullptr;
        if (slots) {
            array(x_factors, layers), array(g_factors, layers);
            pointer(coefficients), pointer(new_coefficients), pointer(position), pointer(new_position);
        } else if (parts > 1) {
            array(new_w, layers), array(new_s, layers);
        }
        clip = scalars[0], threshold = scalars[1], lr = scalars[2], output_eps = scalars[3];
    }

    long channels() const { return heads * widths[0]; }
};

template <class T>
inline T sigmoid(T z) {
    return 1 / (1 + std::exp(-z));
}

// Decoder is a `RowDecoder` or a `FactoredDecoder`.
template <class T, template <class, class> class Decoder>
struct LayerStep {
    const LayerStepArgs<T>& args;
    Decoder<T, LayerStepArgs<T>> row;
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
