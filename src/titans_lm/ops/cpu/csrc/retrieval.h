// M(q) for tokens of one row and head, at weights that no token changes (eq. 15), and its backward pass. `mlp.py`, `retrieve`,
// is the same in PyTorch.

#pragma once
#include "chunk_forward.h"

template <class T>
struct Retrieval {
    const SavedLayout<T>& layout;
    Activation activation;
    long tokens;
    std::vector<Matrix<T>> x, z,
        act_derivative;  // of each layer: its input, from the second on; its output; act' of it
    Matrix<T> transposed, dz, dx;
    Norm<T> norm;
    std::vector<T> scaled;

    Retrieval(const SavedLayout<T>& layout, Activation activation, long tokens)
        : layout(layout), activation(activation), tokens(tokens), transposed(layout.widest, layout.widest),
          dz(tokens, layout.widest), dx(tokens, layout.widest), norm(layout.layers.back().out),
          scaled(layout.layers.back().out) {
        for (const Layer& n : layout.layers) {
            x.emplace_back(tokens, n.in), z.emplace_back(tokens, n.out), act_derivative.emplace_back(tokens, n.out);
        }
    }

    // The rows of q and y are `stride` scalars apart. `weight` and `bias` are the residual form's, or null.
    void forward(const T* state, const T* q, long stride, const T* weight, const T* bias, T* y) {
        run(state, q, stride);
        const Layer& n = layout.layers.back();
        for (long t = 0; t < tokens; ++t, q += stride, y += stride) {
            const T* row = z.back().row(t);
            if (weight) {
                norm.forward(row);
                for (long j = 0; j < n.out; ++j) y[j] = q[j] + norm.normed[j] * weight[j] + bias[j];
            } else {
                std::copy_n(row, n.out, y);
            }
        }
    }

    void run(const T* state, const T* q, long stride) {
        for (long l = 0; l <= layout.last(); ++l) {
            const Layer& n = layout.layers[l];
            Term<T> term{l ? x[l].data() : q, l ? n.ld_in : stride, 1, state + n.w, n.ld_out, n.in};
            product<T, 1>(tokens, n.out, {term}, Zero<T>{}, z[l].data(), n.ld_out);
            if (l < layout.last())
                activate<T>(activation, tokens, n.out, z[l].data(), n.ld_out, x[l + 1].data(), act_derivative[l].data(),
                            {});
        }
    }

    // Compute the gradient by q from that by y; add those by the weights (in `grad_state`) and by weight and bias.
    void backward(const T* state, const T* q, const T* grad_y, long stride, const T* weight, T* grad_q, T* grad_state,
                  T* grad_weight, T* grad_bias) {
        run(state, q, stride);
        output_backward(grad_y, stride, weight, grad_weight, grad_bias);
        const T one[1] = {1};
        for (long l = layout.last(); l >= 0; --l) {
            const Layer& n = layout.layers[l];
            T* grad_w = grad_state + n.w;
            Term<T> term{l ? x[l].data() : q, 1, l ? n.ld_in : stride, dz.data(), n.ld_out, tokens};
            product<T, 1>(n.in, n.out, {term}, Scaled<T>{grad_w, one, n.ld_out}, grad_w, n.ld_out);
            transpose(n.in, n.out, state + n.w, n.ld_out, transposed.data(), n.ld_in);
            product<T, 1>(tokens, n.in, {{dz.data(), n.ld_out, 1, transposed.data(), n.ld_in, n.out}}, Zero<T>{},
                          dx.data(), n.ld_in);
            if (l) multiply(tokens, n.in, dx.data(), act_derivative[l - 1].data(), dz.data(), n.ld_in);
        }
        const Layer& first = layout.layers[0];
        for (long t = 0; t < tokens; ++t)
            for (long j = 0; j < first.in; ++j)
                grad_q[t * stride + j] = dx.data()[t * first.ld_in + j] + (weight ? grad_y[t * stride + j] : T(0));
    }

    // Compute dz of the last layer.
    void output_backward(const T* grad_y, long stride, const T* weight, T* grad_weight, T* grad_bias) {
        const Layer& n = layout.layers.back();
        for (long t = 0; t < tokens; ++t, grad_y += stride) {
            T* row = dz.data() + t * n.ld_out;
            if (!weight) {
                std::copy_n(grad_y, n.out, row);
                continue;
            }
            norm.forward(z.back().row(t));
            for (long j = 0; j < n.out; ++j) {
                scaled[j] = grad_y[j] * weight[j];
                grad_weight[j] += grad_y[j] * norm.normed[j];
                grad_bias[j] += grad_y[j];
            }
            norm.backward(scaled.data(), row);
        }
    }
};
