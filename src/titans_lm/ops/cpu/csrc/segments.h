// MAC's segments (eqs. 21 to 25), one after another: retrieve at the weights the segment began with, attend over
// [P, h, S], write the result and read after each token. `models/segments.py` is the same in PyTorch.

#pragma once
#include "attention.h"
#include "layer_scan.h"
#include "retrieval.h"

// The fields after those of LayerArgs are those of `compiled_segments.SegmentStructure`, in its order. Groups are segments, all
// whole; x is what is written. A = attention_heads * attention_width.
template <class T>
struct SegmentArgs : LayerArgs<T> {
    long persistent, attention_heads, attention_width;
    double retrieved_eps, written_eps;
    const T *s, *queries, *gate;  // [B, T, D], [B, T, I], [B, T, I]
    const T *q, *k, *v;           // [B, attention_heads, T, attention_width]
    const T *first_k, *first_v;   // of persistent tokens, [B, attention_heads, P, attention_width]
    const T *retrieved_norm, *written_norm, *kv_proj, *attention_proj;  // [D], [D], [2 A, D], [D, A]
    T *retrieved, *h_gated, *h, *h_normed, *kv, *attended, *y;          // [B, T, I or D or 2 A or A]
    // For the backward pass alone.
    const T* grad_y;
    T *grad_s, *grad_queries, *grad_gate, *grad_q, *grad_k, *grad_v, *grad_first_k, *grad_first_v;
    T *grad_attention, *grad_kv, *grad_h;        // by what projections return
    T *grad_retrieved_norm, *grad_written_norm;  // [blocks, D]

    long attention_channels() const { return attention_heads * attention_width; }
};

template <class T>
struct SegmentWeights : LayerWeights<T> {
    Matrix<T> kv, attention;

    SegmentWeights(const SegmentArgs<T>& a, bool backward)
        : LayerWeights<T>(a, backward), kv(pack_weight(2 * a.attention_channels(), a.dim, a.kv_proj, backward)),
          attention(pack_weight(a.dim, a.attention_channels(), a.attention_proj, backward)) {}
};

template <class T, class Row>
struct SegmentWorker : LayerWorker<T, Row> {
    using Base = LayerWorker<T, Row>;
    using Base::out, Base::row, Base::project, Base::store;

    const SegmentArgs<T>& a;
    const SegmentWeights<T>& weights;
    Retrieval<T> retrieval;
    HeadAttention<T> head;

    SegmentWorker(const SegmentArgs<T>& a, const SegmentWeights<T>& weights)
        : Base(a, weights, 2 * a.attention_channels()), a(a), weights(weights),
          retrieval(row.layout, row.form.activation, a.size), head(a.size, a.persistent, a.attention_width) {}

    void retrieve(long segment, long r) {
        long at = a.memory_offset(segment, r);
        row.select(r);
        retrieval.forward(a.state(segment, r), a.queries + at, a.channels(), row.weight, row.bias, a.retrieved + at);
        Base::apply_output_gate(segment, r, a.retrieved, a.gate, a.h_gated);
    }

    // h, and its keys and values
    void project_retrieved(const TokenBlock& block) {
        long at = block.first * a.dim;
        project(block, a.h_gated + block.first * a.channels(), a.channels(), weights.output, a.dim);
        store(block, 0, a.dim, a.h);
        for (long t = 0; t < block.count; ++t)
            rms_norm(a.dim, out.row(t), a.retrieved_norm, a.retrieved_eps, a.h_normed + at + t * a.dim);
        project(block, a.h_normed + at, a.dim, weights.kv, 2 * a.attention_channels());
        store(block, 0, 2 * a.attention_channels(), a.kv);
    }

    // The place of a head's output at the segment's first token, in a tensor [B, T, A].
    long attention_offset(long segment, long job) const {
        long b = job / a.attention_heads, of = job % a.attention_heads;
        return (b * a.tokens + segment * a.size) * a.attention_channels() + of * a.attention_width;
    }

    // Compute the head's attention, in `head`.
    void run_attention(long segment, long job) {
        long b = job / a.attention_heads, of = job % a.attention_heads, width = a.attention_width;
        long own = (job * a.tokens + segment * a.size) * width, first = job * a.persistent * width;
        long stride = 2 * a.attention_channels();
        const T* kv = a.kv + (b * a.tokens + segment * a.size) * stride + of * width;
        copy_rows(a.size, width, a.q + own, width, head.q.data(), head.q.ld);
        head.parts[0].load(width, a.first_k + first, a.first_v + first, width);
        head.parts[1].load(width, kv, kv + a.attention_channels(), stride);
        head.parts[2].load(width, a.k + own, a.v + own, width);
        head.forward();
    }

    void attend(long segment, long job) {
        run_attention(segment, job);
        T* attended = a.attended + attention_offset(segment, job);
        copy_rows(a.size, a.attention_width, head.y.data(), head.y.ld, attended, a.attention_channels());
    }

    // Attention's output, and what is written
    void project_attended(const TokenBlock& block) {
        long columns = a.attention_channels();
        project(block, a.attended + block.first * columns, columns, weights.attention, a.dim);
        store(block, 0, a.dim, a.y);
        for (long t = 0; t < block.count; ++t) {
            long at = (block.first + t) * a.dim;
            T* x = out.row(t);
            for (long j = 0; j < a.dim; ++j) x[j] += a.s[at + j];
            rms_norm(a.dim, x, a.written_norm, a.written_eps, a.x + at);
        }
    }

    // ------------------------------------------------------------------------------------------------ backward passes

    // From `out`, the gradient by what is written. `grad` [B, size, A] becomes that by `attended`.
    void project_attended_backward(const TokenBlock& block, T* grad) {
        std::vector<T> x(a.dim);
        for (long t = 0; t < block.count; ++t) {
            long at = (block.first + t) * a.dim;
            for (long j = 0; j < a.dim; ++j) x[j] = a.s[at + j] + a.y[at + j];
            rms_norm_backward(a.dim, x.data(), a.written_norm, a.written_eps, out.row(t), a.grad_s + at,
                              a.grad_written_norm + block.index * a.dim);
            for (long j = 0; j < a.dim; ++j) a.grad_attention[at + j] = a.grad_s[at + j] + a.grad_y[at + j];
        }
        long columns = a.attention_channels();
        project(block, a.grad_attention + block.first * a.dim, a.dim, weights.attention, columns);
        copy_rows(block.count, columns, out.data(), out.ld, grad + block.local * columns, columns);
    }

    void attend_backward(long segment, long job, const T* grad) {
        long b = job / a.attention_heads, of = job % a.attention_heads, width = a.attention_width;
        long columns = a.attention_channels(), own = (job * a.tokens + segment * a.size) * width;
        run_attention(segment, job);
        copy_rows(a.size, width, grad + b * a.size * columns + of * width, columns, head.grad_y.data(), head.grad_y.ld);
        head.backward_queries();
        copy_rows(a.size, width, head.y.data(), head.y.ld, a.grad_q + own, width);
        T* kv = a.grad_kv + (b * a.tokens + segment * a.size) * 2 * columns + of * width;
        store_keys(head.parts[1], kv, kv + columns, 2 * columns);
        store_keys(head.parts[2], a.grad_k + own, a.grad_v + own, width);
        long first = job * a.persistent * width;
        head.backward_keys(head.parts[0]);
        add_first(a.grad_first_k + first);
        head.backward_values(head.parts[0]);
        add_first(a.grad_first_v + first);
    }

    void store_keys(KeysPart<T>& part, T* keys, T* values, long stride) {
        Matrix<T>& from = head.scratch;
        head.backward_keys(part);
        copy_rows(part.count, a.attention_width, from.data(), from.ld, keys, stride);
        head.backward_values(part);
        copy_rows(part.count, a.attention_width, from.data(), from.ld, values, stride);
    }

    void add_first(T* grad) {
        for (long t = 0; t < a.persistent; ++t, grad += a.attention_width)
            for (long j = 0; j < a.attention_width; ++j) grad[j] += head.scratch.row(t)[j];
    }

    void project_retrieved_backward(const TokenBlock& block, T* grad_gated) {
        long columns = 2 * a.attention_channels();
        project(block, a.grad_kv + block.first * columns, columns, weights.kv, a.dim);
        for (long t = 0; t < block.count; ++t) {
            long at = (block.first + t) * a.dim;
            rms_norm_backward(a.dim, a.h + at, a.retrieved_norm, a.retrieved_eps, out.row(t), a.grad_h + at,
                              a.grad_retrieved_norm + block.index * a.dim);
        }
        project(block, a.grad_h + block.first * a.dim, a.dim, weights.output, a.channels());
        copy_rows(block.count, a.channels(), out.data(), out.ld, grad_gated + block.local * a.channels(), a.channels());
    }

    void retrieve_backward(long segment, long r, T* grad) {
        Base::output_gate_backward(segment, r, a.retrieved, a.gate, a.h_gated, grad, a.grad_gate);
        row.select(r);
        long at = a.memory_offset(segment, r), local = (r / a.heads * a.size * a.heads + r % a.heads) * a.width;
        T *grad_weight = row.weight ? a.scan->grad_weight + r * a.width : nullptr,
          *grad_bias = row.weight ? a.scan->grad_bias + r * a.width : nullptr;
        retrieval.backward(a.state(segment, r), a.queries + at, grad + local, a.channels(), row.weight,
                           a.grad_queries + at, a.carried + r * a.state_size, grad_weight, grad_bias);
    }
};

template <class T>
bool segments_forward(const SegmentArgs<T>& a) {
    typedef SegmentWorker<T, RowForward<T>> Worker;
    LayerTeam<T, Worker, SegmentWeights<T>, SegmentArgs<T>> all(a, false);
    all.load_state(a.scan->w, a.scan->s, a.state(0, 0));
    for (long i = 0; i < a.groups(); ++i) {
        all.rows([&](Worker& w, long r) { w.retrieve(i, r); });
        all.blocks(i, [](Worker& w, const TokenBlock& block) { w.project_retrieved(block); });
        all.run(a.batch * a.attention_heads, [&](Worker& w, long job) { w.attend(i, job); });
        all.blocks(i, [](Worker& w, const TokenBlock& block) {
            w.project_attended(block);
            w.project_written(block);
        });
        all.rows([&](Worker& w, long r) { w.write(i, r); });
        all.blocks(i, [](Worker& w, const TokenBlock& block) { w.project_output(block); });
    }
    all.save_state(a.state(a.groups(), 0), a.scan->new_w, a.scan->new_s);
    return all.team.failed();
}

template <class T>
bool segments_backward(const SegmentArgs<T>& a) {
    typedef SegmentWorker<T, RowBackward<T>> Worker;
    LayerTeam<T, Worker, SegmentWeights<T>, SegmentArgs<T>> all(a, true);
    std::vector<T> gated(a.batch * a.size * a.channels()), attended(a.batch * a.size * a.attention_channels());
    all.load_state(a.scan->grad_w, a.scan->grad_s, a.carried);
    for (long i = a.groups() - 1; i >= 0; --i) {
        all.blocks(i, [&](Worker& w, const TokenBlock& block) { w.project_output_backward(block, gated.data()); });
        all.rows([&](Worker& w, long r) { w.write_backward(i, r, gated.data()); });
        all.run(3 * a.heads, [&](Worker& w, long job) { w.features_backward(i, job); });
        all.blocks(i, [&](Worker& w, const TokenBlock& block) {
            w.project_written_backward(block);
            w.project_attended_backward(block, attended.data());
        });
        all.run(a.batch * a.attention_heads, [&](Worker& w, long job) { w.attend_backward(i, job, attended.data()); });
        all.blocks(i, [&](Worker& w, const TokenBlock& block) { w.project_retrieved_backward(block, gated.data()); });
        all.rows([&](Worker& w, long r) { w.retrieve_backward(i, r, gated.data()); });
    }
    all.save_state(a.carried, a.scan->grad_w, a.scan->grad_s);
    return all.team.failed();
}
