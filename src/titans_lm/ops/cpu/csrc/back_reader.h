// Rows one after another, each from its last chunk to its first: the gradients of what `Reader` read.

#pragma once
#include "back.h"
#include "reader.h"

template <class T>
struct BackReader : Reader<T> {
    using Base = Reader<T>;
    using Base::call, Base::plan, Base::chunk, Base::chunks, Base::anchors, Base::r, Base::weight, Base::at;

    BackChunk<T> by;
    std::vector<T> by_state, by_weight, by_bias, weight_here, bias_here;  // here: of one chunk, for sums of sums
    std::vector<Matrix<T>> by_anchor;
    std::vector<T*> by_anchors, by_w;  // by_w: where the gradient by W' lies in by_state
    std::vector<T> traces;             // of a group's chunks, and the state after them

    explicit BackReader(const Call<T>& call)
        : Base(call), by(chunk), by_state(plan.state), by_weight(plan.layers.back().out), by_bias(by_weight),
          weight_here(by_weight), bias_here(by_weight), by_anchor(Base::anchor) {
        for (auto& m : by_anchor) by_anchors.push_back(m.data());
        by_w = Base::layers_of(by_state.data(), &Layer::w);
        if (!call.traces) traces.resize(std::min(call.group, chunks) * plan.trace + plan.state);
    }

    void back(long row) {
        Base::begin(row);
        for (auto* x : {&by_weight, &by_bias, &weight_here, &bias_here}) std::fill(x->begin(), x->end(), T(0));
        Base::load_layers(call.by_anchor, by_anchors.data());
        Base::load_state(call.by_w, call.by_s, by_state.data());
        for (long group = (chunks - 1) / call.group; group >= 0; --group) back_group(group);
        Base::save_layers(by_anchors.data(), call.by_anchor);
        Base::save_state(by_state.data(), call.by_w, call.by_s);
        long out = plan.layers.back().out;
        if (weight) {
            std::copy_n(by_weight.data(), out, call.by_weight + r * out);
            std::copy_n(by_bias.data(), out, call.by_bias + r * out);
        }
    }

    // Goes back through the group's chunks, if they were not kept after reading them once more.
    void back_group(long group) {
        long first = group * call.group, end = std::min(chunks, first + call.group);
        if (call.traces) return back_chunks(first, end, Base::kept(first));
        if (group)
            Base::copy_state(Base::start(group), traces.data());
        else
            Base::load_state(call.w, call.s, traces.data());
        for (long i = first; i < end; ++i) {
            T *trace = traces.data() + (i - first) * plan.trace, *next = trace + plan.trace;
            if (Base::is_empty(i))
                Base::copy_state(trace, next);
            else
                Base::read_chunk(i, trace, next, false);
        }
        back_chunks(first, end, traces.data());
    }

    void back_chunks(long first, long end, T* trace) {
        for (long i = end - 1; i >= first; --i) {
            if (Base::is_empty(i))
                put_nothing(i);
            else
                back_chunk(i, trace + (i - first) * plan.trace);
        }
    }

    void back_chunk(long i, T* trace) {
        Base::load_tokens(i);
        back_output(i, trace);
        std::vector<T> by_loss(plan.c);
        for (long t = 0; t < plan.c && call.by_loss; ++t) by_loss[t] = call.by_loss[at(i, 1) + t * call.heads];
        std::vector<T*> anchor = Base::anchor_at(trace);
        T* const* to = call.at_boundary ? by_w.data() : by_anchors.data();
        by.back_chunk(trace, anchor.data(), by_state.data(), to, by_loss.data(), weight_here.data());
        if (call.at_boundary && i == Base::last_chunk)  // the anchor that was returned is what W' was here
            for (size_t l = 0; l < by_w.size(); ++l) {
                std::vector<T>& returned = by_anchor[l].numbers;
                for (size_t j = 0; j < returned.size(); ++j) by_w[l][j] += returned[j];
                std::fill(returned.begin(), returned.end(), T(0));
            }
        put(i);
        for (size_t j = 0; j < by_weight.size(); ++j) {
            by_weight[j] += weight_here[j], weight_here[j] = 0;
            by_bias[j] += bias_here[j], bias_here[j] = 0;
        }
    }

    // From the gradient by y to that by Y_L.
    void back_output(long i, T* trace) {
        const Layer& n = plan.layers.back();
        Norm<T> norm(n.out);
        std::vector<T> scaled(n.out);
        for (long t = 0; t < plan.c; ++t) {
            const T* by_y = call.by_y + at(i, n.out) + t * call.heads * n.out;
            T* to = by.y.back().row(t);
            if (!weight) {
                std::copy_n(by_y, n.out, to);
                continue;
            }
            norm.of(trace + n.y + t * n.ld_out);
            for (long j = 0; j < n.out; ++j) {
                scaled[j] = by_y[j] * weight[j];
                weight_here[j] += by_y[j] * norm.n[j];
            }
            norm.back(scaled.data(), to);
        }
    }

    void put(long i) {
        long in = plan.layers[0].in, out = plan.layers.back().out;
        for (long t = 0; t < plan.c; ++t) {
            long first = at(i, in) + t * call.heads * in, last = at(i, out) + t * call.heads * out;
            const T *q = by.q.row(t), *k = by.k.row(t), *shift = by.shift.row(t), *y = call.by_y + last;
            for (long j = 0; j < in; ++j) {
                call.by_q[first + j] = weight ? q[j] + y[j] : q[j];
                call.by_k[first + j] = weight ? k[j] + shift[j] : k[j];
            }
            for (long j = 0; j < out; ++j) {
                call.by_v[last + j] = -shift[j];
                if (weight) bias_here[j] += y[j] + shift[j];
            }
        }
        long gate = at(i, 1);
        by.by_decays.back(chunk.decays, call.by_theta + gate, call.by_eta + gate, call.by_alpha + gate, call.heads);
    }

    void put_nothing(long i) {
        long in = plan.layers[0].in, out = plan.layers.back().out;
        for (long t = 0; t < plan.c; ++t) {
            for (T* by : {call.by_q, call.by_k}) std::fill_n(by + at(i, in) + t * call.heads * in, in, T(0));
            std::fill_n(call.by_v + at(i, out) + t * call.heads * out, out, T(0));
            for (T* by : {call.by_theta, call.by_eta, call.by_alpha}) by[at(i, 1) + t * call.heads] = 0;
        }
    }
};
