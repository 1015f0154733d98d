// The backward pass of one row and head, from the last chunk to the first.

#pragma once
#include "chunk_backward.h"
#include "row_forward.h"

template <class T>
struct RowBackward : RowForward<T> {
    using Base = RowForward<T>;
    using Base::args, Base::layout, Base::chunk, Base::chunks, Base::anchors, Base::r, Base::weight, Base::token_offset;

    ChunkBackward<T> grads;
    std::vector<T> grad_state, grad_weight, grad_bias;
    std::vector<T> chunk_grad_weight, chunk_grad_bias;  // of one chunk: sums of sums round less
    std::vector<Matrix<T>> grad_anchor;
    std::vector<T*> grad_anchors, grad_w;  // grad_w: pointers to the gradient by W' in grad_state
    std::vector<T> group_saved;            // activations of a recomputed group, and the state after it

    explicit RowBackward(const ScanArgs<T>& args)
        : Base(args), grads(chunk), grad_state(layout.state_size), grad_weight(layout.layers.back().out),
          grad_bias(grad_weight), chunk_grad_weight(grad_weight), chunk_grad_bias(grad_weight),
          grad_anchor(Base::anchor) {
        for (auto& m : grad_anchor) grad_anchors.push_back(m.data());
        grad_w = Base::layers_of(grad_state.data(), &Layer::w);
        if (!args.saved) group_saved.resize(std::min(args.group, chunks) * layout.saved_size + layout.state_size);
    }

    void backward(long row) {
        Base::begin(row);
        for (auto* x : {&grad_weight, &grad_bias, &chunk_grad_weight, &chunk_grad_bias})
            std::fill(x->begin(), x->end(), T(0));
        Base::load_layers(args.grad_anchor, grad_anchors.data());
        Base::load_state(args.grad_w, args.grad_s, grad_state.data());
        for (long group = (chunks - 1) / args.group; group >= 0; --group) group_backward(group);
        Base::save_layers(grad_anchors.data(), args.grad_anchor);
        Base::save_state(grad_state.data(), args.grad_w, args.grad_s);
        long out = layout.layers.back().out;
        if (weight) {
            std::copy_n(grad_weight.data(), out, args.grad_weight + r * out);
            std::copy_n(grad_bias.data(), out, args.grad_bias + r * out);
        }
    }

    // Go back through the group's chunks. Recompute them first if their activations were not saved.
    void group_backward(long group) {
        long first = group * args.group, end = std::min(chunks, first + args.group);
        if (args.saved) return chunks_backward(first, end, Base::saved_chunk(first));
        if (group)
            Base::copy_state(Base::group_start(group), group_saved.data());
        else
            Base::load_state(args.w, args.s, group_saved.data());
        recompute_backward(first, end);
    }

    // Go back through some chunks. The state before the first is in `group_saved`.
    void recompute_backward(long first, long end) {
        for (long i = first; i < end; ++i) {
            T *saved = group_saved.data() + (i - first) * layout.saved_size, *next = saved + layout.saved_size;
            if (Base::is_empty(i))
                Base::copy_state(saved, next);
            else
                Base::chunk_forward(i, saved, next, false);
        }
        chunks_backward(first, end, group_saved.data());
    }

    void chunks_backward(long first, long end, T* saved) {
        for (long i = end - 1; i >= first; --i) {
            if (Base::is_empty(i))
                store_zeros(i);
            else
                chunk_backward(i, saved + (i - first) * layout.saved_size);
        }
    }

    void chunk_backward(long i, T* saved) {
        Base::load_tokens(i);
        residual_backward(i, saved);
        std::vector<T> grad_loss(layout.c);
        for (long t = 0; t < layout.c && args.grad_loss; ++t)
            grad_loss[t] = args.grad_loss[token_offset(i, 1) + t * args.heads];
        std::vector<T*> anchor = Base::anchor_at(saved);
        T* const* dst = args.at_boundary ? grad_w.data() : grad_anchors.data();
        grads.chunk_backward(saved, anchor.data(), grad_state.data(), dst, grad_loss.data(), chunk_grad_weight.data());
        if (args.at_boundary && i == Base::last_chunk)  // the returned anchor is W' before this chunk
            for (size_t l = 0; l < grad_w.size(); ++l) {
                std::vector<T>& returned = grad_anchor[l].numbers;
                for (size_t j = 0; j < returned.size(); ++j) grad_w[l][j] += returned[j];
                std::fill(returned.begin(), returned.end(), T(0));
            }
        store_gradients(i);
        for (size_t j = 0; j < grad_weight.size(); ++j) {
            grad_weight[j] += chunk_grad_weight[j], chunk_grad_weight[j] = 0;
            grad_bias[j] += chunk_grad_bias[j], chunk_grad_bias[j] = 0;
        }
    }

    // Compute the gradient by Y_L from that by y.
    void residual_backward(long i, T* saved) {
        const Layer& n = layout.layers.back();
        Norm<T> norm(n.out);
        std::vector<T> scaled(n.out);
        for (long t = 0; t < layout.c; ++t) {
            const T* grad_y = args.grad_y + token_offset(i, n.out) + t * args.heads * n.out;
            T* dst = grads.y.back().row(t);
            if (!weight) {
                std::copy_n(grad_y, n.out, dst);
                continue;
            }
            norm.forward(saved + n.y + t * n.ld_out);
            for (long j = 0; j < n.out; ++j) {
                scaled[j] = grad_y[j] * weight[j];
                chunk_grad_weight[j] += grad_y[j] * norm.normed[j];
            }
            norm.backward(scaled.data(), dst);
        }
    }

    void store_gradients(long i) {
        long in = layout.layers[0].in, out = layout.layers.back().out;
        for (long t = 0; t < layout.c; ++t) {
            long first = token_offset(i, in) + t * args.heads * in, last = token_offset(i, out) + t * args.heads * out;
            const T *q = grads.q.row(t), *k = grads.k.row(t), *shift = grads.shift.row(t), *y = args.grad_y + last;
            for (long j = 0; j < in; ++j) {
                args.grad_q[first + j] = weight ? q[j] + y[j] : q[j];
                args.grad_k[first + j] = weight ? k[j] + shift[j] : k[j];
            }
            for (long j = 0; j < out; ++j) {
                args.grad_v[last + j] = -shift[j];
                if (weight) chunk_grad_bias[j] += y[j] + shift[j];
            }
        }
        long gate = token_offset(i, 1);
        grads.grad_decays.backward(chunk.decays, args.grad_theta + gate, args.grad_eta + gate, args.grad_alpha + gate,
                                   args.heads);
    }

    void store_zeros(long i) {
        long in = layout.layers[0].in, out = layout.layers.back().out;
        for (long t = 0; t < layout.c; ++t) {
            for (T* grad : {args.grad_q, args.grad_k})
                std::fill_n(grad + token_offset(i, in) + t * args.heads * in, in, T(0));
            std::fill_n(args.grad_v + token_offset(i, out) + t * args.heads * out, out, T(0));
            for (T* grad : {args.grad_theta, args.grad_eta, args.grad_alpha})
                grad[token_offset(i, 1) + t * args.heads] = 0;
        }
    }
};
