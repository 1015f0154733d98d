// The forward pass of one chunk, for one row and head. Letters and equations are those of README.md two folders up;
// `chunked/chunk.py` is the same in PyTorch. Saved for the backward pass are W' and S before the chunk, and Z, G, Y,
// dloss/dX and H X^T of each layer.

#pragma once
#include <algorithm>

#include "decays.h"
#include "mlp.h"

template <class T>
struct Matrix {
    long ld;
    std::vector<T> numbers;

    Matrix(long rows, long columns) : ld(leading_dim<T>(columns)), numbers(rows * ld) {}
    T* data() { return numbers.data(); }
    T* row(long i) { return data() + i * ld; }
};

struct Layer {  // its widths, and the offsets of its tensors in a chunk's saved activations
    long in, out, ld_in, ld_out;
    long w, s, z, g, y, dloss_dx, raw;
};

template <class T>
struct SavedLayout {
    long c, ld_c, widest;
    long state_size, saved_size;  // scalars of W' and S of all layers, which come first, and of all saved activations
    std::vector<Layer> layers;

    SavedLayout(long c, const long* widths, long count) : c(c), ld_c(leading_dim<T>(c)), widest(c), state_size(0) {
        for (long l = 0; l < count; ++l) {
            Layer n{};
            n.in = widths[l], n.ld_in = leading_dim<T>(n.in);
            n.out = widths[l + 1], n.ld_out = leading_dim<T>(n.out);
            n.w = state_size;
            n.s = n.w + n.in * n.ld_out;
            state_size = n.s + n.in * n.ld_out;
            widest = std::max({widest, n.in, n.out});
            layers.push_back(n);
        }
        saved_size = state_size;
        for (Layer& n : layers) {
            n.z = saved_size;
            n.g = n.z + c * n.ld_out;
            n.y = n.g + c * n.ld_out;
            n.dloss_dx = n.y + c * n.ld_out;  // G_{l+1} W_{l+1}^T; the last layer has none
            n.raw = n.dloss_dx + (&n == &layers.back() ? 0 : c * n.ld_out);
            saved_size = n.raw + c * ld_c;
        }
    }

    long last() const { return layers.size() - 1; }
};

struct Form {
    Activation activation;
    double clip;  // 0: none
    bool has_threshold, surprise;
    double threshold;
};

template <class T>
struct ChunkForward {
    const SavedLayout<T>& layout;
    const Form& form;
    Decays<T> decays;
    Matrix<T> q, k, shift;               // shift: see `InnerLoss::forward`
    std::vector<T> loss, gradient_norm;  // [C], if needed

    InnerLoss<T> inner_loss;
    std::vector<char> written;
    std::vector<Matrix<T>> x, h, act_derivative;  // X_l and H_l, from the second layer on; act'(Z_l)
    Matrix<T> transposed, scratch3, scratch1, scratch2, scores;

    ChunkForward(const SavedLayout<T>& layout, const Form& form)
        : layout(layout), form(form), decays(layout.c), q(layout.c, layout.layers[0].in),
          k(layout.c, layout.layers[0].in), shift(layout.c, layout.layers.back().out), loss(layout.c),
          gradient_norm(layout.c), inner_loss(layout.layers.back().out, form.clip), written(layout.c, 1),
          transposed(layout.widest, layout.widest), scratch3(layout.widest, layout.c),
          scratch1(layout.c, layout.widest), scratch2(layout.c, layout.widest), scores(layout.c, layout.c) {
        for (const Layer& n : layout.layers) {
            x.emplace_back(layout.c, n.in);
            h.emplace_back(layout.c, n.in);
            act_derivative.emplace_back(layout.c, n.out);
        }
    }

    T* x_at(long l) { return l ? x[l].data() : k.data(); }
    T* h_at(long l) { return l ? h[l].data() : q.data(); }

    // Process the chunk from `anchor` (for each layer [in, out], rows ld_out apart) and from the W' and S in `saved`. Fill in
    // the rest of `saved`, and put the state after the chunk into `after`, which may be the same place. `may_skip`: a chunk
    // that writes nothing may skip its gradients.
    void forward(T* saved, T* const* anchor, T* after, bool may_skip) {
        bool writes = !(may_skip && decays.writes_nothing()) && key_pass(saved, anchor, may_skip);
        for (long l = 0; l <= layout.last(); ++l) {
            const Layer& n = layout.layers[l];
            if (l)
                activate<T>(form.activation, layout.c, n.in, saved + layout.layers[l - 1].y, n.ld_in, h_at(l), {}, {});
            read_layer(n, saved, l, writes);
        }
        for (long l = 0; l <= layout.last(); ++l) write_layer(layout.layers[l], saved, l, after, writes);
    }

    // Run the keys forward and backward at the anchor. Returns false if none is written and G was skipped.
    bool key_pass(T* saved, T* const* anchor, bool may_skip) {
        long c = layout.c;
        for (long l = 0; l <= layout.last(); ++l) {
            const Layer& n = layout.layers[l];
            product<T, 1>(c, n.out, {{x_at(l), n.ld_in, 1, anchor[l], n.ld_out, n.in}}, Zero<T>{}, saved + n.z,
                          n.ld_out);
            if (l < layout.last())
                activate<T>(form.activation, c, n.out, saved + n.z, n.ld_out, x_at(l + 1), act_derivative[l].data(),
                            {});
        }
        if (!output_gradients(saved) && may_skip) return false;
        for (long l = layout.last(); l; --l) {
            const Layer &n = layout.layers[l], &below = layout.layers[l - 1];
            times_transposed(n, saved + n.g, anchor[l], saved + below.dloss_dx);
            multiply(c, n.in, saved + below.dloss_dx, act_derivative[l - 1].data(), saved + below.g, n.ld_in);
        }
        if (form.surprise) compute_gradient_norm(saved);
        if (form.has_threshold) zero_unwritten(saved);
        return true;
    }

    // Compute the inner loss of token t from its Z_L = z. Returns whether the token is written.
    bool compute_loss(const T* z, long t) {
        inner_loss.forward(z, shift.row(t));
        return !form.has_threshold || inner_loss.loss > T(form.threshold);
    }

    // out [C, in] = tokens [C, out] times (matrix [in, out])^T. Transposes the smaller of the two.
    void times_transposed(const Layer& n, const T* tokens, const T* matrix, T* out) {
        long c = layout.c, ld = layout.ld_c;
        if (c * (n.in + n.out) < n.in * n.out) {
            transpose(c, n.out, tokens, n.ld_out, transposed.data(), ld);
            product<T, 1>(n.in, c, {{matrix, n.ld_out, 1, transposed.data(), ld, n.out}}, Zero<T>{}, scratch3.data(),
                          ld);
            transpose(n.in, c, scratch3.data(), ld, out, n.ld_in);
        } else {
            transpose(n.in, n.out, matrix, n.ld_out, transposed.data(), n.ld_in);
            product<T, 1>(c, n.in, {{tokens, n.ld_out, 1, transposed.data(), n.ld_in, n.out}}, Zero<T>{}, out, n.ld_in);
        }
    }

    // Compute G_L of every token. Returns whether any is written.
    bool output_gradients(T* saved) {
        const Layer& n = layout.layers.back();
        bool any = false;
        for (long t = 0; t < layout.c; ++t) {
            written[t] = compute_loss(saved + n.z + t * n.ld_out, t);
            loss[t] = inner_loss.loss;
            any |= written[t];
            T factor = inner_loss.factor(), *g = saved + n.g + t * n.ld_out;
            for (long i = 0; i < n.out; ++i) g[i] = inner_loss.gradient[i] * factor;
        }
        return any;
    }

    void compute_gradient_norm(T* saved) {
        for (long t = 0; t < layout.c; ++t) {
            T sum = 0;
            for (long l = 0; l <= layout.last(); ++l) {
                const Layer& n = layout.layers[l];
                T *row = x_at(l) + t * n.ld_in, *g = saved + n.g + t * n.ld_out;
                sum += dot(row, row, n.in) * dot(g, g, n.out);
            }
            gradient_norm[t] = std::sqrt(sum);
        }
    }

    void zero_unwritten(T* saved) {
        for (const Layer& n : layout.layers)
            for (long t = 0; t < layout.c; ++t)
                if (!written[t]) std::fill_n(saved + n.g + t * n.ld_out, n.out, T(0));
    }

    // Y = A * (H W') + B * (H S) - ((H X^T) * D) G
    void read_layer(const Layer& n, T* saved, long l, bool writes) {
        long c = layout.c, ld = layout.ld_c;
        T *h = h_at(l), *y = saved + n.y;
        scale_rows(c, n.in, decays.a.data(), h, scratch1.data(), n.ld_in);
        scale_rows(c, n.in, decays.b.data(), h, scratch2.data(), n.ld_in);
        Term<T> w{scratch1.data(), n.ld_in, 1, saved + n.w, n.ld_out, n.in};
        Term<T> s{scratch2.data(), n.ld_in, 1, saved + n.s, n.ld_out, n.in};
        if (!writes) return product<T, 2>(c, n.out, {w, s}, Zero<T>{}, y, n.ld_out);
        T* raw = saved + n.raw;
        transpose(c, n.in, x_at(l), n.ld_in, transposed.data(), ld);
        product<T, 1>(c, c, {{h, n.ld_in, 1, transposed.data(), ld, n.in}}, Zero<T>{}, raw, ld, Triangle::lower);
        minus_times_d(raw, scores.data());
        Term<T> g{scores.data(), ld, 1, saved + n.g, n.ld_out, c, Triangle::lower};
        product<T, 3>(c, n.out, {w, s, g}, Zero<T>{}, y, n.ld_out);
    }

    // y = -(x * D), [C, C], from the lower triangle of x.
    void minus_times_d(const T* x, T* y) {
        for (long t = 0; t < layout.c; ++t) {
            const T *src = x + t * layout.ld_c, *d = &decays.d[t * layout.ld_c];
            T* dst = y + t * layout.ld_c;
            for (long s = 0; s <= t; ++s) dst[s] = -src[s] * d[s];
            for (long s = t + 1; s < layout.ld_c; ++s) dst[s] = 0;
        }
    }

    // W' <- A[C] W' + B[C] S - X^T (D[C] * G),  S <- E[C] S - X^T (Em[C] * G): scales the narrower of X and G.
    void write_layer(const Layer& n, T* saved, long l, T* after, bool writes) {
        long c = writes ? layout.c : 0;
        T *x = x_at(l), *g = saved + n.g, *w = saved + n.w, *s = saved + n.s;
        bool scale_x = n.in <= n.out;
        scale_rows(c, scale_x ? n.in : n.out, decays.minus_d.data(), scale_x ? x : g, scratch1.data(),
                   scale_x ? n.ld_in : n.ld_out);
        scale_rows(c, scale_x ? n.in : n.out, decays.minus_em.data(), scale_x ? x : g, scratch2.data(),
                   scale_x ? n.ld_in : n.ld_out);
        Term<T> for_w{scale_x ? scratch1.data() : x, 1, n.ld_in, scale_x ? g : scratch1.data(), n.ld_out, c};
        Term<T> for_s{scale_x ? scratch2.data() : x, 1, n.ld_in, scale_x ? g : scratch2.data(), n.ld_out, c};
        product<T, 1>(n.in, n.out, {for_w}, ScaledSum<T>{w, decays.end_a(), s, decays.end_b(), n.ld_out}, after + n.w,
                      n.ld_out);
        product<T, 1>(n.in, n.out, {for_s}, Scaled<T>{s, decays.end_e(), n.ld_out}, after + n.s, n.ld_out);
    }
};
