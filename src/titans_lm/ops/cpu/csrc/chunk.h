// One row and head reads one chunk. Letters and equations are those of README.md two folders up; `chunked/chunk.py` says the
// same in PyTorch. What a chunk leaves for its backward pass is its trace: W' and S as it found them, and Z, G, Y,
// `back` and H X^T of each layer.

#pragma once
#include <algorithm>

#include "decays.h"
#include "mlp.h"

template <class T>
struct Matrix {
    long ld;
    std::vector<T> numbers;

    Matrix(long rows, long columns) : ld(leading<T>(columns)), numbers(rows * ld) {}
    T* data() { return numbers.data(); }
    T* row(long i) { return data() + i * ld; }
};

struct Layer {  // its widths, and where its numbers lie in a trace
    long in, out, ld_in, ld_out;
    long w, s, z, g, y, back, raw;
};

template <class T>
struct Plan {
    long c, ld_c, widest;
    long state, trace;  // numbers of W' and S of all layers, with which a trace begins, and of a whole trace
    std::vector<Layer> layers;

    Plan(long c, const long* widths, long count) : c(c), ld_c(leading<T>(c)), widest(c), state(0) {
        for (long l = 0; l < count; ++l) {
            Layer n{};
            n.in = widths[l], n.ld_in = leading<T>(n.in);
            n.out = widths[l + 1], n.ld_out = leading<T>(n.out);
            n.w = state;
            n.s = n.w + n.in * n.ld_out;
            state = n.s + n.in * n.ld_out;
            widest = std::max({widest, n.in, n.out});
            layers.push_back(n);
        }
        trace = state;
        for (Layer& n : layers) {
            n.z = trace;
            n.g = n.z + c * n.ld_out;
            n.y = n.g + c * n.ld_out;
            n.back = n.y + c * n.ld_out;  // G_{l+1} W_{l+1}^T; none of the last layer
            n.raw = n.back + (&n == &layers.back() ? 0 : c * n.ld_out);
            trace = n.raw + c * ld_c;
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
struct Chunk {
    const Plan<T>& plan;
    const Form& form;
    Decays<T> decays;
    Matrix<T> q, k, shift;               // shift: see `Top::of`
    std::vector<T> loss, gradient_norm;  // [C], if asked for or needed

    Top<T> top;
    std::vector<char> written;
    std::vector<Matrix<T>> x, h, slope;  // X_l and H_l, from the second layer on; act'(Z_l)
    Matrix<T> turned, narrow, one, two, scores;

    Chunk(const Plan<T>& plan, const Form& form)
        : plan(plan), form(form), decays(plan.c), q(plan.c, plan.layers[0].in), k(plan.c, plan.layers[0].in),
          shift(plan.c, plan.layers.back().out), loss(plan.c), gradient_norm(plan.c),
          top(plan.layers.back().out, form.clip), written(plan.c, 1), turned(plan.widest, plan.widest),
          narrow(plan.widest, plan.c), one(plan.c, plan.widest), two(plan.c, plan.widest), scores(plan.c, plan.c) {
        for (const Layer& n : plan.layers) {
            x.emplace_back(plan.c, n.in);
            h.emplace_back(plan.c, n.in);
            slope.emplace_back(plan.c, n.out);
        }
    }

    T* x_of(long l) { return l ? x[l].data() : k.data(); }
    T* h_of(long l) { return l ? h[l].data() : q.data(); }

    // Reads at `anchor` (for each layer [in, out], rows ld_out apart) and at the W' and S of `trace`, fills in the rest
    // of the trace, and puts the state that follows into `after`, which may be where it was. `may_skip`: gradients of a
    // chunk that writes nothing, for which no one asks then.
    void read(T* trace, T* const* anchor, T* after, bool may_skip) {
        bool writes = !(may_skip && decays.nothing_is_written()) && key_pass(trace, anchor, may_skip);
        for (long l = 0; l <= plan.last(); ++l) {
            const Layer& n = plan.layers[l];
            if (l) activate<T>(form.activation, plan.c, n.in, trace + plan.layers[l - 1].y, n.ld_in, h_of(l), {}, {});
            read_layer(n, trace, l, writes);
        }
        for (long l = 0; l <= plan.last(); ++l) write_layer(plan.layers[l], trace, l, after, writes);
    }

    // The keys, forward and back at the anchor. False: none is written, and G was not computed.
    bool key_pass(T* trace, T* const* anchor, bool may_skip) {
        long c = plan.c;
        for (long l = 0; l <= plan.last(); ++l) {
            const Layer& n = plan.layers[l];
            product<T, 1>(c, n.out, {{x_of(l), n.ld_in, 1, anchor[l], n.ld_out, n.in}}, Nothing<T>{}, trace + n.z,
                          n.ld_out);
            if (l < plan.last())
                activate<T>(form.activation, c, n.out, trace + n.z, n.ld_out, x_of(l + 1), slope[l].data(), {});
        }
        if (!output(trace) && may_skip) return false;
        for (long l = plan.last(); l; --l) {
            const Layer &n = plan.layers[l], &below = plan.layers[l - 1];
            times_turned(n, trace + n.g, anchor[l], trace + below.back);
            multiply(c, n.in, trace + below.back, slope[l - 1].data(), trace + below.g, n.ld_in);
        }
        if (form.surprise) measure(trace);
        if (form.has_threshold) clear_unwritten(trace);
        return true;
    }

    // Runs `top` for token t, whose Z_L is z; whether the token is to be written.
    bool weigh(const T* z, long t) {
        top.of(z, shift.row(t));
        return !form.has_threshold || top.loss > T(form.threshold);
    }

    // out [C, in] = tokens [C, out] times (matrix [in, out])^T, by whichever is less to transpose.
    void times_turned(const Layer& n, const T* tokens, const T* matrix, T* out) {
        long c = plan.c, ld = plan.ld_c;
        if (c * (n.in + n.out) < n.in * n.out) {
            transpose(c, n.out, tokens, n.ld_out, turned.data(), ld);
            product<T, 1>(n.in, c, {{matrix, n.ld_out, 1, turned.data(), ld, n.out}}, Nothing<T>{}, narrow.data(), ld);
            transpose(n.in, c, narrow.data(), ld, out, n.ld_in);
        } else {
            transpose(n.in, n.out, matrix, n.ld_out, turned.data(), n.ld_in);
            product<T, 1>(c, n.in, {{tokens, n.ld_out, 1, turned.data(), n.ld_in, n.out}}, Nothing<T>{}, out, n.ld_in);
        }
    }

    // G_L of every token; whether any is written.
    bool output(T* trace) {
        const Layer& n = plan.layers.back();
        bool any = false;
        for (long t = 0; t < plan.c; ++t) {
            written[t] = weigh(trace + n.z + t * n.ld_out, t);
            loss[t] = top.loss;
            any |= written[t];
            T factor = top.factor(), *g = trace + n.g + t * n.ld_out;
            for (long i = 0; i < n.out; ++i) g[i] = top.gradient[i] * factor;
        }
        return any;
    }

    void measure(T* trace) {
        for (long t = 0; t < plan.c; ++t) {
            T sum = 0;
            for (long l = 0; l <= plan.last(); ++l) {
                const Layer& n = plan.layers[l];
                T *row = x_of(l) + t * n.ld_in, *g = trace + n.g + t * n.ld_out;
                sum += dot(row, row, n.in) * dot(g, g, n.out);
            }
            gradient_norm[t] = std::sqrt(sum);
        }
    }

    void clear_unwritten(T* trace) {
        for (const Layer& n : plan.layers)
            for (long t = 0; t < plan.c; ++t)
                if (!written[t]) std::fill_n(trace + n.g + t * n.ld_out, n.out, T(0));
    }

    // Y = A * (H W') + B * (H S) - ((H X^T) * D) G
    void read_layer(const Layer& n, T* trace, long l, bool writes) {
        long c = plan.c, ld = plan.ld_c;
        T *h = h_of(l), *y = trace + n.y;
        scale_rows(c, n.in, decays.a.data(), h, one.data(), n.ld_in);
        scale_rows(c, n.in, decays.b.data(), h, two.data(), n.ld_in);
        Term<T> w{one.data(), n.ld_in, 1, trace + n.w, n.ld_out, n.in};
        Term<T> s{two.data(), n.ld_in, 1, trace + n.s, n.ld_out, n.in};
        if (!writes) return product<T, 2>(c, n.out, {w, s}, Nothing<T>{}, y, n.ld_out);
        T* raw = trace + n.raw;
        transpose(c, n.in, x_of(l), n.ld_in, turned.data(), ld);
        product<T, 1>(c, c, {{h, n.ld_in, 1, turned.data(), ld, n.in}}, Nothing<T>{}, raw, ld, Part::lower);
        minus_decayed(raw, scores.data());
        Term<T> g{scores.data(), ld, 1, trace + n.g, n.ld_out, c, Part::lower};
        product<T, 3>(c, n.out, {w, s, g}, Nothing<T>{}, y, n.ld_out);
    }

    // -(x * D), [C, C], of the lower triangle of x.
    void minus_decayed(const T* x, T* y) {
        for (long t = 0; t < plan.c; ++t) {
            const T *from = x + t * plan.ld_c, *d = &decays.d[t * plan.ld_c];
            T* to = y + t * plan.ld_c;
            for (long s = 0; s <= t; ++s) to[s] = -from[s] * d[s];
            for (long s = t + 1; s < plan.ld_c; ++s) to[s] = 0;
        }
    }

    // W' <- A[C] W' + B[C] S - X^T (D[C] * G),  S <- E[C] S - X^T (Em[C] * G): the narrower of X and G is scaled.
    void write_layer(const Layer& n, T* trace, long l, T* after, bool writes) {
        long c = writes ? plan.c : 0;
        T *x = x_of(l), *g = trace + n.g, *w = trace + n.w, *s = trace + n.s;
        bool scale_x = n.in <= n.out;
        scale_rows(c, scale_x ? n.in : n.out, decays.minus_d.data(), scale_x ? x : g, one.data(),
                   scale_x ? n.ld_in : n.ld_out);
        scale_rows(c, scale_x ? n.in : n.out, decays.minus_em.data(), scale_x ? x : g, two.data(),
                   scale_x ? n.ld_in : n.ld_out);
        Term<T> for_w{scale_x ? one.data() : x, 1, n.ld_in, scale_x ? g : one.data(), n.ld_out, c};
        Term<T> for_s{scale_x ? two.data() : x, 1, n.ld_in, scale_x ? g : two.data(), n.ld_out, c};
        product<T, 1>(n.in, n.out, {for_w}, Sum<T>{w, decays.left_a(), s, decays.left_b(), n.ld_out}, after + n.w,
                      n.ld_out);
        product<T, 1>(n.in, n.out, {for_s}, Scaled<T>{s, decays.left_e(), n.ld_out}, after + n.s, n.ld_out);
    }
};
