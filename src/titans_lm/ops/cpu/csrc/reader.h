// Rows one after another, each chunk by chunk, with buffers that all rows share: reading.

#pragma once
#include "call.h"
#include "chunk.h"

template <class T>
struct Reader {
    const Call<T>& call;
    Plan<T> plan;
    Form form;
    long chunks;
    Chunk<T> chunk;
    std::vector<Matrix<T>> anchor;  // where it is not W' at the start of each chunk, and the last one in the end
    std::vector<T*> anchors;
    std::vector<T> trace, end;  // of a chunk where none are kept; the state after the last where they are

    long r = 0, batch = 0, head = 0, last_chunk = -1;  // the row; its last chunk that holds a token
    const T *weight = nullptr, *bias = nullptr;

    explicit Reader(const Call<T>& call)
        : call(call), plan(call.width, call.widths, call.layers),
          form{Activation(call.activation), call.clip, bool(call.has_threshold), bool(call.surprise), call.threshold},
          chunks(call.slots / call.width), chunk(plan, form) {
        for (const Layer& n : plan.layers) anchor.emplace_back(n.in, n.out);
        for (auto& m : anchor) anchors.push_back(m.data());
        trace.resize(call.traces ? 0 : plan.trace);
        end.resize(call.traces ? plan.state : 0);
    }

    void begin(long row) {
        r = row, batch = r / call.heads, head = r % call.heads, last_chunk = -1;
        long out = plan.layers.back().out;
        weight = call.weight ? call.weight + r * out : nullptr;
        bias = call.bias ? call.bias + r * out : nullptr;
        chunk.top.weight = weight;
        for (long i = 0; i < chunks; ++i)
            if (!is_empty(i)) last_chunk = i;
        load_layers(call.anchor, anchors.data());
    }

    // -------------------------------------------------------------------------------------------- numbers of the row

    const unsigned char* present(long i) const {
        return call.present ? call.present + batch * call.slots + i * call.width : nullptr;
    }

    bool is_empty(long i) const {
        const unsigned char* here = present(i);
        return here && !std::any_of(here, here + call.width, [](unsigned char x) { return x != 0; });
    }

    // Of chunk i's first token in a tensor [B, S, H, width].
    long at(long i, long width) const { return ((batch * call.slots + i * call.width) * call.heads + head) * width; }

    void load_layers(const T* const* from, T* const* to) const {
        for (size_t l = 0; l < plan.layers.size(); ++l) {
            const Layer& n = plan.layers[l];
            copy_rows(n.in, n.out, from[l] + r * n.in * n.out, n.out, to[l], n.ld_out);
        }
    }

    void save_layers(const T* const* from, T* const* to) const {
        for (size_t l = 0; l < plan.layers.size(); ++l) {
            const Layer& n = plan.layers[l];
            copy_rows(n.in, n.out, from[l], n.ld_out, to[l] + r * n.in * n.out, n.out);
        }
    }

    std::vector<T*> layers_of(T* state, long Layer::* which) const {
        std::vector<T*> found;
        for (const Layer& n : plan.layers) found.push_back(state + n.*which);
        return found;
    }

    void load_state(const T* const* w, const T* const* s, T* state) const {
        load_layers(w, layers_of(state, &Layer::w).data());
        load_layers(s, layers_of(state, &Layer::s).data());
    }

    void save_state(T* state, T* const* w, T* const* s) const {
        save_layers(layers_of(state, &Layer::w).data(), w);
        save_layers(layers_of(state, &Layer::s).data(), s);
    }

    void load_tokens(long i) {
        long in = plan.layers[0].in, out = plan.layers.back().out, heads = call.heads;
        copy_rows(plan.c, in, call.q + at(i, in), heads * in, chunk.q.data(), chunk.q.ld);
        copy_rows(plan.c, in, call.k + at(i, in), heads * in, chunk.k.data(), chunk.k.ld);
        for (long t = 0; t < plan.c; ++t) {
            const T *v = call.v + at(i, out) + t * heads * out, *k = chunk.k.row(t);
            T* shift = chunk.shift.row(t);
            for (long j = 0; j < out; ++j) shift[j] = weight ? k[j] - v[j] + bias[j] : -v[j];
        }
        long gate = at(i, 1);
        chunk.decays.of(call.theta + gate, call.eta + gate, call.alpha + gate, heads, present(i));
    }

    // ------------------------------------------------------------------------------------------------------- reading

    // The anchor of the chunk whose trace this is.
    std::vector<T*> anchor_at(T* trace) const { return call.at_boundary ? layers_of(trace, &Layer::w) : anchors; }

    void read_chunk(long i, T* trace, T* after, bool may_skip) {
        std::vector<T*> here = anchor_at(trace);
        load_tokens(i);
        if (call.at_boundary && i == last_chunk)
            for (size_t l = 0; l < anchor.size(); ++l) std::copy_n(here[l], anchor[l].numbers.size(), anchors[l]);
        chunk.read(trace, here.data(), after, may_skip);
    }

    void put(long i, T* trace) {
        const Layer& n = plan.layers.back();
        Norm<T> norm(n.out);
        for (long t = 0; t < plan.c; ++t) {
            const T* z = trace + n.y + t * n.ld_out;
            T* y = call.y + at(i, n.out) + t * call.heads * n.out;
            if (weight) {
                norm.of(z);
                for (long j = 0; j < n.out; ++j) y[j] = chunk.q.row(t)[j] + norm.n[j] * weight[j] + bias[j];
            } else {
                std::copy_n(z, n.out, y);
            }
            if (form.surprise) {
                call.loss[at(i, 1) + t * call.heads] = chunk.loss[t];
                call.gradient_norm[at(i, 1) + t * call.heads] = chunk.gradient_norm[t];
            }
        }
    }

    void put_nothing(long i) {
        long out = plan.layers.back().out;
        for (long t = 0; t < plan.c; ++t) {
            std::fill_n(call.y + at(i, out) + t * call.heads * out, out, T(0));
            if (form.surprise) call.loss[at(i, 1) + t * call.heads] = call.gradient_norm[at(i, 1) + t * call.heads] = 0;
        }
    }

    T* start(long group) const { return call.starts + ((group - 1) * call.batch * call.heads + r) * plan.state; }

    // The trace of chunk i, where all are kept.
    T* kept(long i) const {
        long groups = (chunks + call.group - 1) / call.group;
        return call.traces[r * groups + i / call.group] + i % call.group * plan.trace;
    }

    void copy_state(const T* from, T* to) const {
        if (from != to) std::memcpy(to, from, plan.state * sizeof(T));
    }

    // Reads chunk i at the start of `trace`, leaves the state that follows at `next`, and puts out what was read.
    void pass(long i, T* trace, T* next, bool may_skip) {
        if (is_empty(i)) {
            put_nothing(i);
            return copy_state(trace, next);
        }
        read_chunk(i, trace, next, may_skip);
        put(i, trace);
    }

    void read(long row) {
        begin(row);
        T* state = call.traces ? kept(0) : trace.data();
        load_state(call.w, call.s, state);
        bool may_skip = !call.traces && !call.starts && !form.surprise;
        for (long i = 0; i < chunks; ++i) {
            if (call.starts && i && i % call.group == 0) copy_state(state, start(i / call.group));
            T* next = !call.traces ? state : i + 1 < chunks ? kept(i + 1) : end.data();
            pass(i, state, next, may_skip);
            state = next;
        }
        save_layers(anchors.data(), call.last_anchor);
        save_state(state, call.new_w, call.new_s);
    }
};
