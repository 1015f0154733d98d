// A memory layer (eqs. 10 to 15): projections, gates, convolutions, the scan, output norm, output
// gate and output projection, for some tokens after others, so that what they share stays in a cache.
//
// A group of tokens takes a few stages. Jobs of a stage are rows and heads of the memory, or blocks of tokens.

#pragma once
#include <memory>

#include "row_backward.h"
#include "team.h"
#include "token_features.h"

// The fields are those of `compiled_call.LayerStructure`, in its order. I = heads * width channels, G = heads * the number of
// gates. The first `lead` tokens complete a chunk and the last `tail` begin one; both may be none. Groups of whole chunks are
// between them, of `size` tokens, the last maybe of fewer.
template <class T>
struct LayerArgs {
    long batch, tokens, size, lead, tail, dim, heads, width, has_eta, has_alpha, saves, threads, state_size;
    double lr, output_eps;
    // Of whole chunks, of the lead and of the tail, or null; slots: all tokens. Pointers to tokens are to their first ones.
    const ScanArgs<T>*scan, *lead_scan, *tail_scan;
    const FeatureArgs<T>* features;      // past: the state of the convolutions, then room for all tokens
    T* x;                                // [B, T, D]
    const T *memory_proj, *gate_bias;    // [3 I + G + I, D], of q, k, v, gates and output gate; [G]
    const T *output_norm, *output_proj;  // [width], [D, I]
    T* states;                           // [N + 1, B * H, state size] with `saves`, else [1, ..]
    T *theta, *eta, *alpha, *read;       // of all tokens: gates, [B, T, H]; what is retrieved, [B, T, I]
    T *output_gate, *gated, *m;  // before the sigmoid, and o_proj's input, [B, T, I]; the layer's output, [B, T, D]
    // For the backward pass alone.
    T* carried;  // gradient by the state, [B * H, state size]
    T *grad_theta, *grad_eta, *grad_alpha, *grad_read;
    const T* grad_m;                                               // [B, T, D]
    T *grad_x, *grad_gates, *grad_output_gate, *grad_output_norm;  // gates before the bias, [B, T, G]; [B * H, width]

    static constexpr long BLOCK = 32;  // tokens

    long channels() const { return heads * width; }
    long gates() const { return heads * (1 + has_eta + has_alpha); }
    long has_lead() const { return lead > 0; }
    long whole() const { return tokens - lead - tail; }
    long groups() const { return has_lead() + (whole() + size - 1) / size + (tail > 0); }
    bool is_lead(long group) const { return group < has_lead(); }
    bool is_tail(long group) const { return tail > 0 && group == groups() - 1; }
    long first(long group) const {  // token
        if (is_tail(group)) return tokens - tail;
        return is_lead(group) ? 0 : lead + (group - has_lead()) * size;
    }
    long count(long group) const {
        if (is_tail(group)) return tail;
        return is_lead(group) ? lead : std::min(size, lead + whole() - first(group));
    }
    long blocks(long group) const { return (count(group) + BLOCK - 1) / BLOCK; }
    T* state(long group, long r) const { return states + ((saves ? group : 0) * batch * heads + r) * state_size; }
    long memory_offset(long group, long r) const {
        return ((r / heads * tokens + first(group)) * heads + r % heads) * width;
    }
};

// Some tokens of one row of the batch: `first` counts from the first token of the batch's first row; `local` counts from
// the group's first, over the rows of the batch.
struct TokenBlock {
    long first, local, count, index;
};

template <class T>
TokenBlock token_block(const LayerArgs<T>& a, long group, long job) {
    long b = job / a.blocks(group), in_row = job % a.blocks(group), start = in_row * a.BLOCK;
    return {b * a.tokens + a.first(group) + start, b * a.size + start, std::min(a.BLOCK, a.count(group) - start),
            (b * a.groups() + group) * a.blocks(0) + in_row};
}

template <class T>
Matrix<T> packed(long rows, long columns, const T* x) {
    Matrix<T> copy(rows, columns);
    copy_rows(rows, columns, x, columns, copy.data(), copy.ld);
    return copy;
}

template <class T>
Matrix<T> packed_transposed(long rows, long columns, const T* x) {
    Matrix<T> from = packed(rows, columns, x), to(columns, rows);
    transpose(rows, columns, from.data(), from.ld, to.data(), to.ld);
    return to;
}

// A projection's weight [out, in] as a right factor, of its input or, for a backward pass, of the gradient by its output
template <class T>
Matrix<T> pack_weight(long out, long in, const T* x, bool backward) {
    return backward ? packed(out, in, x) : packed_transposed(out, in, x);
}

// y = 1 / (1 + e^-x)
template <class T>
inline void sigmoids(long n, const T* x, T* y) {
    V<T> one = V<T>{} + T(1);
    long i = 0;
    for (; i + WIDTH<T> <= n; i += WIDTH<T>) store(y + i, one / (one + exponential<T>(-load(x + i))));
    for (; i < n; ++i) y[i] = 1 / (1 + std::exp(-x[i]));
}

// y = x / rms(x) * weight
template <class T>
inline void rms_norm(long n, const T* x, const T* weight, double eps, T* y) {
    T scale = 1 / std::sqrt(dot(x, x, n) / n + T(eps));
    for (long i = 0; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

// Compute the gradient by x, and add that by the weight.
template <class T>
inline void rms_norm_backward(long n, const T* x, const T* weight, double eps, const T* grad, T* dx, T* dweight) {
    T scale = 1 / std::sqrt(dot(x, x, n) / n + T(eps));
    for (long i = 0; i < n; ++i) {
        dweight[i] += grad[i] * x[i] * scale;
        dx[i] = grad[i] * weight[i];
    }
    T along = dot(dx, x, n) * scale * scale / n;
    for (long i = 0; i < n; ++i) dx[i] = (dx[i] - x[i] * along) * scale;
}

template <class T>
struct LayerWeights {  // as right factors
    Matrix<T> memory, output;

    LayerWeights(const LayerArgs<T>& a, bool backward)
        : memory(pack_weight(4 * a.channels() + a.gates(), a.dim, a.memory_proj, backward)),
          output(pack_weight(a.dim, a.channels(), a.output_proj, backward)) {}
};

// What one thread needs for all stages. Row is RowForward, or RowBackward for a backward pass.
template <class T, class Row>
struct LayerWorker {
    const LayerArgs<T>& a;
    const LayerWeights<T>& weights;
    Row row;  // of whole chunks
    std::unique_ptr<Row> lead_row, tail_row;
    FeatureWorker<T> features;
    Matrix<T> out;           // of a product, for a block of tokens
    std::vector<T> sigmoid;  // of a token's gates
    std::vector<T> scratch;  // of a token and head

    LayerWorker(const LayerArgs<T>& a, const LayerWeights<T>& weights, long widest = 0)
        : a(a), weights(weights), row(*a.scan), features(*a.features),
          out(a.BLOCK, std::max({a.dim, 4 * a.channels() + a.gates(), widest})), sigmoid(std::max(a.width, a.gates())),
          scratch(a.width) {
        if (a.lead) lead_row.reset(new Row(*a.lead_scan));
        if (a.tail) tail_row.reset(new Row(*a.tail_scan));
    }

    // What processes a group's chunks, at row r of the memory
    Row& row_of(long group, long r) {
        Row& of = a.is_lead(group) ? *lead_row : a.is_tail(group) ? *tail_row : row;
        of.select(r);
        if (a.is_lead(group)) of.load_layers(of.args.anchor, of.anchors.data());
        return of;
    }

    // The first of a group's chunks, as `row_of` counts them
    long first_chunk(long group) const {
        return a.is_lead(group) || a.is_tail(group) ? 0 : (a.first(group) - a.lead) / row.layout.c;
    }

    // out = x times a packed weight
    void project(const TokenBlock& block, const T* x, long in, const Matrix<T>& weight, long columns) {
        product<T, 1>(block.count, columns, {{x, in, 1, weight.numbers.data(), weight.ld, in}}, Zero<T>{}, out.data(),
                      out.ld);
    }

    void store(const TokenBlock& block, long from, long columns, T* to) {
        copy_rows(block.count, columns, out.data() + from, out.ld, to + block.first * columns, columns);
    }

    // Where the projections of a block's first token are
    long past_offset(const TokenBlock& block) const {
        return (block.first + (block.first / a.tokens + 1) * (a.features->size - 1)) * 3 * a.channels();
    }

    void project_written(const TokenBlock& block) {
        long conv = 3 * a.channels();
        project(block, a.x + block.first * a.dim, a.dim, weights.memory, 4 * a.channels() + a.gates());
        T* past = const_cast<T*>(a.features->past) + past_offset(block);
        copy_rows(block.count, conv, out.data(), out.ld, past, conv);
        store(block, conv + a.gates(), a.channels(), a.output_gate);
        for (long t = 0; t < block.count; ++t) compute_gates(block.first + t, out.row(t) + conv);
    }

    void compute_gates(long token, T* z) {
        long at = token * a.heads;
        for (long j = 0; j < a.gates(); ++j) z[j] += a.gate_bias[j];
        sigmoids(a.gates(), z, sigmoid.data());
        const T* gate = sigmoid.data();
        for (long j = 0; j < a.heads; ++j) a.theta[at + j] = T(a.lr) * *gate++;
        for (long j = 0; j < a.heads && a.has_eta; ++j) a.eta[at + j] = *gate++;
        for (long j = 0; j < a.heads && a.has_alpha; ++j) a.alpha[at + j] = *gate++;
    }

    void write(long group, long r) {
        long first = a.first(group), count = a.count(group);
        for (long part = 0; part < 3; ++part) {
            features.begin(part * a.heads + r % a.heads);
            features.forward_tokens(r / a.heads, first, first + count);
        }
        Row& of = row_of(group, r);
        T *state = of.scratch.data(), *before = a.state(group, r), *after = a.state(group + 1, r);
        if (a.is_tail(group)) of.save_layers(of.layers_of(before, &Layer::w).data(), of.args.last_anchor);
        of.copy_state(before, state);
        long start = first_chunk(group), chunks = count / of.layout.c;
        for (long i = 0; i < chunks; ++i) of.run_chunk(start + i, state, i + 1 < chunks ? state : after, !a.saves);
        apply_output_gate(group, r, a.read, a.output_gate, a.gated);
    }

    // The retrieval of one row and head, normalised and gated
    void apply_output_gate(long group, long r, const T* retrieved, const T* gate, T* gated) {
        long at = a.memory_offset(group, r);
        for (long t = 0; t < a.count(group); ++t, at += a.channels()) {
            rms_norm(a.width, retrieved + at, a.output_norm, a.output_eps, gated + at);
            sigmoids(a.width, gate + at, sigmoid.data());
            for (long j = 0; j < a.width; ++j) gated[at + j] *= sigmoid[j];
        }
    }

    void project_output(const TokenBlock& block) {
        project(block, a.gated + block.first * a.channels(), a.channels(), weights.output, a.dim);
        store(block, 0, a.dim, a.m);
    }

    // ------------------------------------------------------------------------------------------------ backward passes

    void project_output_backward(const TokenBlock& block, T* grad_gated) {
        project(block, a.grad_m + block.first * a.dim, a.dim, weights.output, a.channels());
        copy_rows(block.count, a.channels(), out.data(), out.ld, grad_gated + block.local * a.channels(), a.channels());
    }

    // `grad` `[B, size, I]` is by `gated` and becomes that by `retrieved`.
    void output_gate_backward(long group, long r, const T* retrieved, const T* gate, const T* gated, T* grad,
                              T* grad_gate) {
        long at = a.memory_offset(group, r), local = (r / a.heads * a.size * a.heads + r % a.heads) * a.width;
        T* dweight = a.grad_output_norm + r * a.width;
        for (long t = 0; t < a.count(group); ++t, at += a.channels(), local += a.channels()) {
            T* by = grad + local;
            sigmoids(a.width, gate + at, sigmoid.data());
            for (long j = 0; j < a.width; ++j) {
                grad_gate[at + j] = by[j] * gated[at + j] * (1 - sigmoid[j]);
                by[j] *= sigmoid[j];
            }
            rms_norm_backward(a.width, retrieved + at, a.output_norm, a.output_eps, by, scratch.data(), dweight);
            std::copy_n(scratch.data(), a.width, by);
        }
    }

    void write_backward(long group, long r, T* grad) {
        output_gate_backward(group, r, a.read, a.output_gate, a.gated, grad, a.grad_output_gate);
        long at = a.memory_offset(group, r), local = (r / a.heads * a.size * a.heads + r % a.heads) * a.width;
        for (long t = 0; t < a.count(group); ++t, at += a.channels(), local += a.channels())
            std::copy_n(grad + local, a.width, a.grad_read + at);
        scan_backward(group, r, row_of(group, r));
    }

    void scan_backward(long group, long r, Row& of) {
        for (auto* x : {&of.grad_weight, &of.grad_bias, &of.chunk_grad_weight, &of.chunk_grad_bias})
            std::fill(x->begin(), x->end(), T(0));
        for (auto& x : of.grad_anchor) std::fill(x.numbers.begin(), x.numbers.end(), T(0));
        T *carried = a.carried + r * a.state_size, *grads = of.grad_state.data();
        of.copy_state(carried, grads);
        of.copy_state(a.state(group, r), of.group_saved.data());
        long first = first_chunk(group);
        of.recompute_backward(first, first + a.count(group) / of.layout.c);
        if (a.is_lead(group)) of.save_layers(of.grad_anchors.data(), of.args.grad_anchor);
        if (a.is_tail(group)) add_anchor_gradient(of);
        of.copy_state(grads, carried);
        for (long j = 0; j < a.width && of.weight; ++j) {
            a.scan->grad_weight[r * a.width + j] += of.grad_weight[j];
            a.scan->grad_bias[r * a.width + j] += of.grad_bias[j];
        }
    }

    // The returned anchor is W' before the tail.
    void add_anchor_gradient(Row& of) {
        of.load_layers(of.args.grad_anchor, of.grad_anchors.data());
        for (size_t l = 0; l < of.grad_w.size(); ++l)
            for (size_t j = 0; j < of.grad_anchor[l].numbers.size(); ++j)
                of.grad_w[l][j] += of.grad_anchor[l].numbers[j];
    }

    void features_backward(long group, long job) {
        features.begin(job);
        std::fill(features.grad_taps.begin(), features.grad_taps.end(), T(0));
        for (long b = 0; b < a.batch; ++b) features.backward_tokens(b, a.first(group), a.first(group) + a.count(group));
        features.add_filter_gradients();
    }

    // out = the gradient by x
    void project_written_backward(const TokenBlock& block) {
        long conv = 3 * a.channels(), gates = a.gates();
        for (long t = 0; t < block.count; ++t) gates_backward(block.first + t);
        const Matrix<T>& w = weights.memory;
        const T* rows = w.numbers.data();
        product<T, 3>(block.count, a.dim,
                      {{a.features->grad_past + past_offset(block), conv, 1, rows, w.ld, conv},
                       {a.grad_gates + block.first * gates, gates, 1, rows + conv * w.ld, w.ld, gates},
                       {a.grad_output_gate + block.first * a.channels(), a.channels(), 1, rows + (conv + gates) * w.ld,
                        w.ld, a.channels()}},
                      Zero<T>{}, out.data(), out.ld);
    }

    void gates_backward(long token) {
        T* grad = a.grad_gates + token * a.gates();
        long at = token * a.heads;
        for (long j = at; j < at + a.heads; ++j) *grad++ = a.grad_theta[j] * a.theta[j] * (1 - a.theta[j] / T(a.lr));
        for (long j = at; j < at + a.heads && a.has_eta; ++j) *grad++ = a.grad_eta[j] * a.eta[j] * (1 - a.eta[j]);
        for (long j = at; j < at + a.heads && a.has_alpha; ++j)
            *grad++ = a.grad_alpha[j] * a.alpha[j] * (1 - a.alpha[j]);
    }
};

// Threads, each with a worker of its own.
template <class T, class Worker, class Weights, class Args>
struct LayerTeam {
    const Args& a;
    Weights weights;
    Team team;
    std::vector<std::unique_ptr<Worker>> workers;

    LayerTeam(const Args& a, bool backward) : a(a), weights(a, backward), team(a.threads) {
        for (long i = 0; i < team.members(); ++i) workers.emplace_back(new Worker(a, weights));
    }

    void rows(const std::function<void(Worker&, long)>& act) { run(a.batch * a.heads, act); }
    void blocks(long group, const std::function<void(Worker&, const TokenBlock&)>& act) {
        run(a.batch * a.blocks(group), [&](Worker& w, long job) { act(w, token_block<T>(a, group, job)); });
    }
    void run(long jobs, const std::function<void(Worker&, long)>& act) {
        team.run(jobs, [&](long member, long job) { act(*workers[member], job); });
    }

    void load_state(const T* const* w, const T* const* s, T* state) {
        auto& row = workers[0]->row;
        for (long r = 0; r < a.batch * a.heads; ++r) row.select(r), row.load_state(w, s, state + r * a.state_size);
    }
    void save_state(T* state, T* const* w, T* const* s) {
        auto& row = workers[0]->row;
        for (long r = 0; r < a.batch * a.heads; ++r) row.select(r), row.save_state(state + r * a.state_size, w, s);
    }
};

template <class T>
bool layer_forward(const LayerArgs<T>& a) {
    typedef LayerWorker<T, RowForward<T>> Worker;
    LayerTeam<T, Worker, LayerWeights<T>, LayerArgs<T>> all(a, false);
    all.load_state(a.scan->w, a.scan->s, a.state(0, 0));
    for (long i = 0; i < a.groups(); ++i) {
        all.blocks(i, [](Worker& w, const TokenBlock& block) { w.project_written(block); });
        all.rows([&](Worker& w, long r) { w.write(i, r); });
        all.blocks(i, [](Worker& w, const TokenBlock& block) { w.project_output(block); });
    }
    all.save_state(a.state(a.groups(), 0), a.scan->new_w, a.scan->new_s);
    return all.team.failed();
}

template <class T>
bool layer_backward(const LayerArgs<T>& a) {
    typedef LayerWorker<T, RowBackward<T>> Worker;
    LayerTeam<T, Worker, LayerWeights<T>, LayerArgs<T>> all(a, true);
    std::vector<T> grad(a.batch * a.size * a.channels());
    all.load_state(a.scan->grad_w, a.scan->grad_s, a.carried);
    for (long i = a.groups() - 1; i >= 0; --i) {
        all.blocks(i, [&](Worker& w, const TokenBlock& block) { w.project_output_backward(block, grad.data()); });
        all.rows([&](Worker& w, long r) { w.write_backward(i, r, grad.data()); });
        all.run(3 * a.heads, [&](Worker& w, long job) { w.features_backward(i, job); });
        all.blocks(i, [&](Worker& w, const TokenBlock& block) {
            w.project_written_backward(block);
            w.store(block, 0, a.dim, a.grad_x);
        });
    }
    all.save_state(a.carried, a.scan->grad_w, a.scan->grad_s);
    return all.team.failed();
}
