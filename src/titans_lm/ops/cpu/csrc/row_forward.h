// The forward pass of one row and head, chunk after chunk. All rows that a thread processes share its buffers.

#pragma once
#include "scan_args.h"
#include "chunk_forward.h"

template <class T>
struct RowForward {
    const ScanArgs<T>& args;
    SavedLayout<T> layout;
    Form form;
    long chunks;
    ChunkForward<T> chunk;
    std::vector<Matrix<T>> anchor;  // the given anchor; with at_boundary, at the end, that of the last chunk
    std::vector<T*> anchors;
    std::vector<T> scratch;    // the activations of one chunk, if none are saved
    std::vector<T> end_state;  // after the last chunk, if activations are saved

    long r = 0, batch = 0, head = 0, last_chunk = -1;  // the row; its last chunk with a token
    const T *weight = nullptr, *bias = nullptr;

    explicit RowForward(const ScanArgs<T>& args)
        : args(args), layout(args.chunk_size, args.widths, args.layers),
          form{Activation(args.activation), args.clip, bool(args.has_threshold), bool(args.surprise), args.threshold},
          chunks(args.slots / args.chunk_size), chunk(layout, form) {
        for (const Layer& n : layout.layers) anchor.emplace_back(n.in, n.out);
        for (auto& m : anchor) anchors.push_back(m.data());
        scratch.resize(args.saved ? 0 : layout.saved_size);
        end_state.resize(args.saved ? layout.state_size : 0);
    }

    void select(long row) {
        r = row, batch = r / args.heads, head = r % args.heads, last_chunk = -1;
        long out = layout.layers.back().out;
        weight = args.weight ? args.weight + r * out : nullptr;
        bias = args.bias ? args.bias + r * out : nullptr;
        chunk.inner_loss.weight = weight;
    }

    void begin(long row) {
        select(row);
        for (long i = 0; i < chunks; ++i)
            if (!is_empty(i)) last_chunk = i;
        load_layers(args.anchor, anchors.data());
    }

    // -------------------------------------------------------------------------------------------- the row's tensors

    const unsigned char* valid(long i) const {
        return args.valid ? args.valid + batch * args.slots + i * args.chunk_size : nullptr;
    }

    bool is_empty(long i) const {
        const unsigned char* slots = valid(i);
        return slots && !std::any_of(slots, slots + args.chunk_size, [](unsigned char x) { return x != 0; });
    }

    // The offset of chunk i's first token in a tensor [B, S, H, width].
    long token_offset(long i, long width) const {
        return ((batch * args.slots + i * args.chunk_size) * args.heads + head) * width;
    }

    void load_layers(const T* const* src, T* const* dst) const {
        for (size_t l = 0; l < layout.layers.size(); ++l) {
            const Layer& n = layout.layers[l];
            copy_rows(n.in, n.out, src[l] + r * n.in * n.out, n.out, dst[l], n.ld_out);
        }
    }

    void save_layers(const T* const* src, T* const* dst) const {
        for (size_t l = 0; l < layout.layers.size(); ++l) {
            const Layer& n = layout.layers[l];
            copy_rows(n.in, n.out, src[l], n.ld_out, dst[l] + r * n.in * n.out, n.out);
        }
    }

    std::vector<T*> layers_of(T* state, long Layer::* which) const {
        std::vector<T*> pointers;
        for (const Layer& n : layout.layers) pointers.push_back(state + n.*which);
        return pointers;
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
        long in = layout.layers[0].in, out = layout.layers.back().out, heads = args.heads;
        copy_rows(layout.c, in, args.q + token_offset(i, in), heads * in, chunk.q.data(), chunk.q.ld);
        copy_rows(layout.c, in, args.k + token_offset(i, in), heads * in, chunk.k.data(), chunk.k.ld);
        for (long t = 0; t < layout.c; ++t) {
            const T *v = args.v + token_offset(i, out) + t * heads * out, *k = chunk.k.row(t);
            T* shift = chunk.shift.row(t);
            for (long j = 0; j < out; ++j) shift[j] = weight ? k[j] - v[j] + bias[j] : -v[j];
        }
        long gate = token_offset(i, 1);
        chunk.decays.compute(args.theta + gate, args.eta + gate, args.alpha + gate, heads, valid(i));
    }

    // ------------------------------------------------------------------------------------------------------- chunks

    // The anchor of the chunk with these saved activations.
    std::vector<T*> anchor_at(T* saved) const { return args.at_boundary ? layers_of(saved, &Layer::w) : anchors; }

    void chunk_forward(long i, T* saved, T* after, bool may_skip) {
        std::vector<T*> pointers = anchor_at(saved);
        load_tokens(i);
        if (args.at_boundary && i == last_chunk)
            for (size_t l = 0; l < anchor.size(); ++l) std::copy_n(pointers[l], anchor[l].numbers.size(), anchors[l]);
        chunk.forward(saved, pointers.data(), after, may_skip);
    }

    void store_outputs(long i, T* saved) {
        const Layer& n = layout.layers.back();
        Norm<T> norm(n.out);
        for (long t = 0; t < layout.c; ++t) {
            const T* z = saved + n.y + t * n.ld_out;
            T* y = args.y + token_offset(i, n.out) + t * args.heads * n.out;
            if (weight) {
                norm.forward(z);
                for (long j = 0; j < n.out; ++j) y[j] = chunk.q.row(t)[j] + norm.normed[j] * weight[j] + bias[j];
            } else {
                std::copy_n(z, n.out, y);
            }
            if (form.surprise) {
                args.loss[token_offset(i, 1) + t * args.heads] = chunk.loss[t];
                args.gradient_norm[token_offset(i, 1) + t * args.heads] = chunk.gradient_norm[t];
            }
        }
    }

    void store_zeros(long i) {
        long out = layout.layers.back().out;
        for (long t = 0; t < layout.c; ++t) {
            std::fill_n(args.y + token_offset(i, out) + t * args.heads * out, out, T(0));
            if (form.surprise)
                args.loss[token_offset(i, 1) + t * args.heads] =
                    args.gradient_norm[token_offset(i, 1) + t * args.heads] = 0;
        }
    }

    T* group_start(long group) const {
        return args.starts + ((group - 1) * args.batch * args.heads + r) * layout.state_size;
    }

    // The saved activations of chunk i, if all are saved.
    T* saved_chunk(long i) const {
        long groups = (chunks + args.group - 1) / args.group;
        return args.saved[r * groups + i / args.group] + i % args.group * layout.saved_size;
    }

    void copy_state(const T* src, T* dst) const {
        if (src != dst) std::memcpy(dst, src, layout.state_size * sizeof(T));
    }

    // Process chunk i from the state in `saved`, put the state after it into `next`, and store its outputs.
    void run_chunk(long i, T* saved, T* next, bool may_skip) {
        if (is_empty(i)) {
            store_zeros(i);
            return copy_state(saved, next);
        }
        chunk_forward(i, saved, next, may_skip);
        store_outputs(i, saved);
    }

    void forward(long row) {
        begin(row);
        T* state = args.saved ? saved_chunk(0) : scratch.data();
        load_state(args.w, args.s, state);
        bool may_skip = !args.saved && !args.starts && !form.surprise;
        for (long i = 0; i < chunks; ++i) {
            if (args.starts && i && i % args.group == 0) copy_state(state, group_start(i / args.group));
            T* next = !args.saved ? state : i + 1 < chunks ? saved_chunk(i + 1) : end_state.data();
            run_chunk(i, state, next, may_skip);
            state = next;
        }
        save_layers(anchors.data(), args.last_anchor);
        save_state(state, args.new_w, args.new_s);
    }
};
