// The backward pass of one chunk: the derivative of chunk_forward.h, last line first, as in README.md two folders up.

#pragma once
#include "chunk_forward.h"

template <class T>
struct ChunkBackward {
    ChunkForward<T>& chunk;
    const SavedLayout<T>& layout;
    DecayGradients<T> grad_decays;
    Matrix<T> q, k, shift;                                              // gradients by the tokens, [C, *]
    std::vector<Matrix<T>> y, g, z, dloss_dx, x;                        // by Y_l, G_l, Z_l, dloss/dX and X_l
    std::vector<Matrix<T>> read_act_derivative, act_second_derivative;  // act'(Y_l), act''(Z_l)
    Matrix<T> raw, h;
    const T unit_[1] = {1};

    explicit ChunkBackward(ChunkForward<T>& chunk)
        : chunk(chunk), layout(chunk.layout), grad_decays(layout.c), q(layout.c, layout.layers[0].in),
          k(layout.c, layout.layers[0].in), shift(layout.c, layout.layers.back().out), raw(layout.c, layout.c),
          h(layout.c, layout.widest) {
        for (const Layer& n : layout.layers) {
            for (auto* m : {&y, &g, &z, &dloss_dx, &read_act_derivative, &act_second_derivative})
                m->emplace_back(layout.c, n.out);
            x.emplace_back(layout.c, n.in);
        }
    }

    // Inputs are the last layer's `y`, `grad_loss` [C] or null, and `grad_state`, the gradient by the state after the chunk,
    // which becomes that by the state before. `grad_anchor` and `grad_weight` are added to.
    void chunk_backward(T* saved, T* const* anchor, T* grad_state, T* const* grad_anchor, const T* grad_loss,
                        T* grad_weight) {
        recompute_activations(saved);
        grad_decays.clear();
        for (long l = layout.last(); l >= 0; --l) layer_backward(layout.layers[l], saved, l, grad_state);
        key_pass_backward(saved, anchor, grad_anchor, grad_loss, grad_weight);
    }

    // Recompute the activations and their derivatives, which are not saved.
    void recompute_activations(T* saved) {
        Activation activation = chunk.form.activation;
        for (long l = 0; l < layout.last(); ++l) {
            const Layer& n = layout.layers[l];
            activate<T>(activation, layout.c, n.out, saved + n.z, n.ld_out, chunk.x_at(l + 1),
                        chunk.act_derivative[l].data(), act_second_derivative[l].data());
            activate<T>(activation, layout.c, n.out, saved + n.y, n.ld_out, chunk.h_at(l + 1),
                        read_act_derivative[l].data(), {});
        }
    }

    void layer_backward(const Layer& n, T* saved, long l, T* grad_state) {
        long c = layout.c, ld = layout.ld_c;
        Decays<T>& decays = chunk.decays;
        T *x_l = chunk.x_at(l), *h_l = chunk.h_at(l), *g_l = saved + n.g, *dy = y[l].data();
        T *dw = grad_state + n.w, *ds = grad_state + n.s, *scratch1 = chunk.scratch1.data(),
          *scratch2 = chunk.scratch2.data();
        T *transposed = chunk.transposed.data(), *scores = chunk.scores.data();

        // - ((H X^T) * D) G
        transpose(c, n.out, g_l, n.ld_out, transposed, ld);
        product<T, 1>(c, c, {{dy, n.ld_out, 1, transposed, ld, n.out}}, Zero<T>{}, scores, ld, Triangle::lower);
        for (long t = 0; t < c; ++t)
            for (long s = 0; s <= t; ++s) grad_decays.d[t * ld + s] -= scores[t * ld + s] * saved[n.raw + t * ld + s];
        chunk.minus_times_d(scores, raw.data());
        chunk.minus_times_d(saved + n.raw, scores);

        // gradient by G, of the writes
        scale_rows(c, n.in, decays.minus_d.data(), x_l, scratch1, n.ld_in);
        scale_rows(c, n.in, decays.minus_em.data(), x_l, scratch2, n.ld_in);
        product<T, 3>(c, n.out,
                      {{scratch1, n.ld_in, 1, dw, n.ld_out, n.in},
                       {scratch2, n.ld_in, 1, ds, n.ld_out, n.in},
                       {scores, 1, ld, dy, n.ld_out, c, Triangle::upper}},
                      Zero<T>{}, g[l].data(), n.ld_out);

        // gradients by X, D[C] and Em[C], of the writes
        chunk.times_transposed(n, g_l, dw, scratch1);
        chunk.times_transposed(n, g_l, ds, scratch2);
        T* last_d = &grad_decays.d[(c - 1) * ld];
        for (long t = 0; t < c; ++t) {
            last_d[t] -= dot(x_l + t * n.ld_in, scratch1 + t * n.ld_in, n.in);
            grad_decays.em[t] -= dot(x_l + t * n.ld_in, scratch2 + t * n.ld_in, n.in);
        }
        RowScaledSum<T> writes{scratch1, decays.minus_d.data(), scratch2, decays.minus_em.data(), n.ld_in};
        product<T, 1>(c, n.in, {{raw.data(), 1, ld, h_l, n.ld_in, c, Triangle::upper}}, writes, x[l].data(), n.ld_in);

        // gradients by H, A and B, of the reads
        chunk.times_transposed(n, dy, saved + n.w, scratch1);
        chunk.times_transposed(n, dy, saved + n.s, scratch2);
        for (long t = 0; t < c; ++t) {
            grad_decays.a[t] += dot(h_l + t * n.ld_in, scratch1 + t * n.ld_in, n.in);
            grad_decays.b[t] += dot(h_l + t * n.ld_in, scratch2 + t * n.ld_in, n.in);
        }
        RowScaledSum<T> reads{scratch1, decays.a.data(), scratch2, decays.b.data(), n.ld_in};
        T* dh = l ? h.data() : q.data();
        product<T, 1>(c, n.in, {{raw.data(), ld, 1, x_l, n.ld_in, c, Triangle::lower}}, reads, dh, n.ld_in);
        if (l) multiply(c, n.in, dh, read_act_derivative[l - 1].data(), y[l - 1].data(), n.ld_in);

        // gradient by the state before the chunk
        for (long i = 0; i < n.in; ++i) {
            const T *w = saved + n.w + i * n.ld_out, *s = saved + n.s + i * n.ld_out;
            grad_decays.a[c - 1] += dot(w, dw + i * n.ld_out, n.out);
            grad_decays.b[c - 1] += dot(s, dw + i * n.ld_out, n.out);
            grad_decays.e += dot(s, ds + i * n.ld_out, n.out);
        }
        scale_rows(c, n.in, decays.a.data(), h_l, scratch1, n.ld_in);
        scale_rows(c, n.in, decays.b.data(), h_l, scratch2, n.ld_in);
        ScaledSum<T> grad_s{ds, decays.end_e(), dw, decays.end_b(), n.ld_out};
        Scaled<T> grad_w{dw, decays.end_a(), n.ld_out};
        product<T, 1>(n.in, n.out, {{scratch2, 1, n.ld_in, dy, n.ld_out, c}}, grad_s, ds, n.ld_out);
        product<T, 1>(n.in, n.out, {{scratch1, 1, n.ld_in, dy, n.ld_out, c}}, grad_w, dw, n.ld_out);
    }

    void key_pass_backward(T* saved, T* const* anchor, T* const* grad_anchor, const T* grad_loss, T* grad_weight) {
        long c = layout.c, last = layout.last();
        const Layer& inner_loss = layout.layers[last];
        for (long t = 0; t < c && chunk.form.has_threshold; ++t)
            if (!chunk.compute_loss(saved + inner_loss.z + t * inner_loss.ld_out, t))
                for (long l = 0; l <= last; ++l) std::fill_n(g[l].row(t), layout.layers[l].out, T(0));
        for (long l = 0; l < last; ++l) {  // G_l = (G_{l+1} W_{l+1}^T) * act'(Z_l), first layer first
            const Layer &n = layout.layers[l], &above = layout.layers[l + 1];
            multiply(c, n.out, g[l].data(), chunk.act_derivative[l].data(), dloss_dx[l].data(), n.ld_out);
            product<T, 1>(c, above.out, {{dloss_dx[l].data(), n.ld_out, 1, anchor[l + 1], above.ld_out, above.in}},
                          Scaled<T>{g[l + 1].data(), unit_, above.ld_out}, g[l + 1].data(), above.ld_out);
            multiply(c, n.out, g[l].data(), saved + n.dloss_dx, z[l].data(), n.ld_out);
            multiply(c, n.out, z[l].data(), act_second_derivative[l].data(), z[l].data(), n.ld_out);
        }
        for (long t = 0; t < c; ++t) {
            chunk.inner_loss.forward(saved + inner_loss.z + t * inner_loss.ld_out, chunk.shift.row(t));
            chunk.inner_loss.backward(g[last].row(t), grad_loss ? grad_loss[t] : T(0), z[last].row(t), shift.row(t),
                                      grad_weight);
        }
        for (long l = last; l >= 0; --l) {  // Z_l = X_l W_l, X_l = act(Z_{l-1}), last layer first
            const Layer& n = layout.layers[l];
            Term<T> forward{chunk.x_at(l), 1, n.ld_in, z[l].data(), n.ld_out, c};
            Scaled<T> before{grad_anchor[l], unit_, n.ld_out};
            if (l)
                product<T, 2>(n.in, n.out, {forward, {dloss_dx[l - 1].data(), 1, n.ld_in, saved + n.g, n.ld_out, c}},
                              before, grad_anchor[l], n.ld_out);
            else
                product<T, 1>(n.in, n.out, {forward}, before, grad_anchor[l], n.ld_out);
            T *dx = l ? x[l].data() : k.data(), *through_z = chunk.scratch1.data();
            chunk.times_transposed(n, z[l].data(), anchor[l], through_z);
            add(c, n.in, x[l].data(), through_z, dx, n.ld_in);
            if (l) add_product(c, n.in, dx, chunk.act_derivative[l - 1].data(), z[l - 1].data(), n.ld_in);
        }
    }
};
