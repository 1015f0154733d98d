// One chunk's backward pass: the derivative of chunk.h, last line first, as README.md two folders up has it.

#pragma once
#include "chunk.h"

template <class T>
struct BackChunk {
    Chunk<T>& chunk;
    const Plan<T>& plan;
    DecayGradients<T> by_decays;
    Matrix<T> q, k, shift;                         // gradients by the tokens', [C, *]
    std::vector<Matrix<T>> y, g, z, back, x;       // by Y_l, G_l, Z_l, `back` and X_l
    std::vector<Matrix<T>> read_slope, curvature;  // act'(Y_l), act''(Z_l)
    Matrix<T> raw, h;
    const T one_[1] = {1};

    explicit BackChunk(Chunk<T>& chunk)
        : chunk(chunk), plan(chunk.plan), by_decays(plan.c), q(plan.c, plan.layers[0].in), k(plan.c, plan.layers[0].in),
          shift(plan.c, plan.layers.back().out), raw(plan.c, plan.c), h(plan.c, plan.widest) {
        for (const Layer& n : plan.layers) {
            for (auto* m : {&y, &g, &z, &back, &read_slope, &curvature}) m->emplace_back(plan.c, n.out);
            x.emplace_back(plan.c, n.in);
        }
    }

    // Given are `y` of the last layer, `by_loss` [C] or null, and `by_state`, by the state after the chunk (laid out as
    // a trace begins), which becomes that by the state before. `by_anchor` and `by_weight` are added to.
    void back_chunk(T* trace, T* const* anchor, T* by_state, T* const* by_anchor, const T* by_loss, T* by_weight) {
        recall(trace);
        by_decays.clear();
        for (long l = plan.last(); l >= 0; --l) back_layer(plan.layers[l], trace, l, by_state);
        back_keys(trace, anchor, by_anchor, by_loss, by_weight);
    }

    // What a trace does not keep.
    void recall(T* trace) {
        Activation activation = chunk.form.activation;
        for (long l = 0; l < plan.last(); ++l) {
            const Layer& n = plan.layers[l];
            activate<T>(activation, plan.c, n.out, trace + n.z, n.ld_out, chunk.x_of(l + 1), chunk.slope[l].data(),
                        curvature[l].data());
            activate<T>(activation, plan.c, n.out, trace + n.y, n.ld_out, chunk.h_of(l + 1), read_slope[l].data(), {});
        }
    }

    void back_layer(const Layer& n, T* trace, long l, T* by_state) {
        long c = plan.c, ld = plan.ld_c;
        Decays<T>& decays = chunk.decays;
        T *x_l = chunk.x_of(l), *h_l = chunk.h_of(l), *g_l = trace + n.g, *dy = y[l].data();
        T *dw = by_state + n.w, *ds = by_state + n.s, *one = chunk.one.data(), *two = chunk.two.data();
        T *turned = chunk.turned.data(), *scores = chunk.scores.data();

        // - ((H X^T) * D) G
        transpose(c, n.out, g_l, n.ld_out, turned, ld);
        product<T, 1>(c, c, {{dy, n.ld_out, 1, turned, ld, n.out}}, Nothing<T>{}, scores, ld, Part::lower);
        for (long t = 0; t < c; ++t)
            for (long s = 0; s <= t; ++s) by_decays.d[t * ld + s] -= scores[t * ld + s] * trace[n.raw + t * ld + s];
        chunk.minus_decayed(scores, raw.data());
        chunk.minus_decayed(trace + n.raw, scores);

        // the writes, by G
        scale_rows(c, n.in, decays.minus_d.data(), x_l, one, n.ld_in);
        scale_rows(c, n.in, decays.minus_em.data(), x_l, two, n.ld_in);
        product<T, 3>(c, n.out,
                      {{one, n.ld_in, 1, dw, n.ld_out, n.in},
                       {two, n.ld_in, 1, ds, n.ld_out, n.in},
                       {scores, 1, ld, dy, n.ld_out, c, Part::upper}},
                      Nothing<T>{}, g[l].data(), n.ld_out);

        // the writes, by X, and by D[C] and Em[C]
        chunk.times_turned(n, g_l, dw, one);
        chunk.times_turned(n, g_l, ds, two);
        T* last_d = &by_decays.d[(c - 1) * ld];
        for (long t = 0; t < c; ++t) {
            last_d[t] -= dot(x_l + t * n.ld_in, one + t * n.ld_in, n.in);
            by_decays.em[t] -= dot(x_l + t * n.ld_in, two + t * n.ld_in, n.in);
        }
        RowSum<T> writes{one, decays.minus_d.data(), two, decays.minus_em.data(), n.ld_in};
        product<T, 1>(c, n.in, {{raw.data(), 1, ld, h_l, n.ld_in, c, Part::upper}}, writes, x[l].data(), n.ld_in);

        // the reads, by H, and by A and B
        chunk.times_turned(n, dy, trace + n.w, one);
        chunk.times_turned(n, dy, trace + n.s, two);
        for (long t = 0; t < c; ++t) {
            by_decays.a[t] += dot(h_l + t * n.ld_in, one + t * n.ld_in, n.in);
            by_decays.b[t] += dot(h_l + t * n.ld_in, two + t * n.ld_in, n.in);
        }
        RowSum<T> reads{one, decays.a.data(), two, decays.b.data(), n.ld_in};
        T* dh = l ? h.data() : q.data();
        product<T, 1>(c, n.in, {{raw.data(), ld, 1, x_l, n.ld_in, c, Part::lower}}, reads, dh, n.ld_in);
        if (l) multiply(c, n.in, dh, read_slope[l - 1].data(), y[l - 1].data(), n.ld_in);

        // the state before
        for (long i = 0; i < n.in; ++i) {
            const T *w = trace + n.w + i * n.ld_out, *s = trace + n.s + i * n.ld_out;
            by_decays.a[c - 1] += dot(w, dw + i * n.ld_out, n.out);
            by_decays.b[c - 1] += dot(s, dw + i * n.ld_out, n.out);
            by_decays.e += dot(s, ds + i * n.ld_out, n.out);
        }
        scale_rows(c, n.in, decays.a.data(), h_l, one, n.ld_in);
        scale_rows(c, n.in, decays.b.data(), h_l, two, n.ld_in);
        Sum<T> by_s{ds, decays.left_e(), dw, decays.left_b(), n.ld_out};
        Scaled<T> by_w{dw, decays.left_a(), n.ld_out};
        product<T, 1>(n.in, n.out, {{two, 1, n.ld_in, dy, n.ld_out, c}}, by_s, ds, n.ld_out);
        product<T, 1>(n.in, n.out, {{one, 1, n.ld_in, dy, n.ld_out, c}}, by_w, dw, n.ld_out);
    }

    void back_keys(T* trace, T* const* anchor, T* const* by_anchor, const T* by_loss, T* by_weight) {
        long c = plan.c, last = plan.last();
        const Layer& top = plan.layers[last];
        for (long t = 0; t < c && chunk.form.has_threshold; ++t)
            if (!chunk.weigh(trace + top.z + t * top.ld_out, t))
                for (long l = 0; l <= last; ++l) std::fill_n(g[l].row(t), plan.layers[l].out, T(0));
        for (long l = 0; l < last; ++l) {  // G_l = (G_{l+1} W_{l+1}^T) * act'(Z_l), from the bottom up
            const Layer &n = plan.layers[l], &above = plan.layers[l + 1];
            multiply(c, n.out, g[l].data(), chunk.slope[l].data(), back[l].data(), n.ld_out);
            product<T, 1>(c, above.out, {{back[l].data(), n.ld_out, 1, anchor[l + 1], above.ld_out, above.in}},
                          Scaled<T>{g[l + 1].data(), one_, above.ld_out}, g[l + 1].data(), above.ld_out);
            multiply(c, n.out, g[l].data(), trace + n.back, z[l].data(), n.ld_out);
            multiply(c, n.out, z[l].data(), curvature[l].data(), z[l].data(), n.ld_out);
        }
        for (long t = 0; t < c; ++t) {
            chunk.top.of(trace + top.z + t * top.ld_out, chunk.shift.row(t));
            chunk.top.back(g[last].row(t), by_loss ? by_loss[t] : T(0), z[last].row(t), shift.row(t), by_weight);
        }
        for (long l = last; l >= 0; --l) {  // Z_l = X_l W_l, X_l = act(Z_{l-1}), from the top down
            const Layer& n = plan.layers[l];
            Term<T> forward{chunk.x_of(l), 1, n.ld_in, z[l].data(), n.ld_out, c};
            Scaled<T> before{by_anchor[l], one_, n.ld_out};
            if (l)
                product<T, 2>(n.in, n.out, {forward, {back[l - 1].data(), 1, n.ld_in, trace + n.g, n.ld_out, c}},
                              before, by_anchor[l], n.ld_out);
            else
                product<T, 1>(n.in, n.out, {forward}, before, by_anchor[l], n.ld_out);
            T *dx = l ? x[l].data() : k.data(), *through_z = chunk.one.data();
            chunk.times_turned(n, z[l].data(), anchor[l], through_z);
            add(c, n.in, x[l].data(), through_z, dx, n.ld_in);
            if (l) add_product(c, n.in, dx, chunk.slope[l - 1].data(), z[l - 1].data(), n.ld_in);
        }
    }
};
