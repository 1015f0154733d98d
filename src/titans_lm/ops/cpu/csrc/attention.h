// MAC's attention within a segment, of one head: token t sees the persistent tokens, and the retrieved and own keys of tokens
// up to t. `layers/attention.py`, `SegmentAttention`, is the same in PyTorch.

#pragma once
#include "chunk_forward.h"

template <class T>
struct KeysPart {
    // Keys and values of some tokens; scores, then probabilities, of all queries, and the gradients by scores
    long count = 0;
    bool causal = false;
    Matrix<T> keys, values, transposed, p, grad;

    KeysPart(long tokens, long count, long width, bool causal)
        : count(count), causal(causal), keys(count, width), values(keys), transposed(width, count), p(tokens, count),
          grad(p) {}

    long seen(long t) const { return causal ? t + 1 : count; }
    Triangle triangle() const { return causal ? Triangle::lower : Triangle::all; }

    void load(long width, const T* k, const T* v, long stride) {
        copy_rows(count, width, k, stride, keys.data(), keys.ld);
        copy_rows(count, width, v, stride, values.data(), values.ld);
    }

    // [tokens, count] = x times (keys or values)^T
    void times_transposed(long tokens, long width, Matrix<T>& x, Matrix<T>& other, Matrix<T>& out) {
        transpose(count, width, other.data(), other.ld, transposed.data(), transposed.ld);
        product<T, 1>(tokens, count, {{x.data(), x.ld, 1, transposed.data(), transposed.ld, width}}, Zero<T>{},
                      out.data(), out.ld, triangle());
    }

    Term<T> forward(Matrix<T>& a, Matrix<T>& b) { return {a.data(), a.ld, 1, b.data(), b.ld, count, triangle()}; }

    // out [count, width] = a^T b
    void backward(long tokens, long width, Matrix<T>& a, Matrix<T>& b, Matrix<T>& out) {
        product<T, 1>(count, width,
                      {{a.data(), 1, a.ld, b.data(), b.ld, tokens, causal ? Triangle::upper : Triangle::all}},
                      Zero<T>{}, out.data(), out.ld);
    }
};

template <class T>
struct HeadAttention {
    long tokens, width;
    T scale;
    KeysPart<T> parts[3];  // persistent, retrieved, own
    Matrix<T> q, y, grad_y, scratch;

    HeadAttention(long tokens, long persistent, long width)
        : tokens(tokens), width(width), scale(1 / std::sqrt(T(width))),
          parts{{tokens, persistent, width, false}, {tokens, tokens, width, true}, {tokens, tokens, width, true}},
          q(tokens, width), y(q), grad_y(q), scratch(std::max(tokens, persistent), width) {}

    // Compute y from q and the parts' keys and values; their p become probabilities.
    void forward() {
        for (auto& part : parts) part.times_transposed(tokens, width, q, part.keys, part.p);
        for (long t = 0; t < tokens; ++t) softmax(t);
        product<T, 3>(tokens, width,
                      {parts[0].forward(parts[0].p, parts[0].values), parts[1].forward(parts[1].p, parts[1].values),
                       parts[2].forward(parts[2].p, parts[2].values)},
                      Zero<T>{}, y.data(), y.ld);
    }

    void softmax(long t) {
        V<T> most = V<T>{} - std::numeric_limits<T>::infinity(), sums = {};
        for (auto& part : parts) {
            std::fill(part.p.row(t) + part.seen(t), part.p.row(t) + part.p.ld, -std::numeric_limits<T>::infinity());
            for (long j = 0; j < part.p.ld; j += WIDTH<T>) {
                V<T> x = load(part.p.row(t) + j);
                most = x > most ? x : most;
            }
        }
        T highest = most[0], sum = 0;
        for (int a = 1; a < WIDTH<T>; ++a) highest = std::max(highest, most[a]);
        for (auto& part : parts) {
            T* p = part.p.row(t);
            for (long j = 0; j < part.p.ld; j += WIDTH<T>)
                store(p + j, exponential<T>((load(p + j) - highest) * scale));
            std::fill(p + part.seen(t), p + part.p.ld, T(0));
            for (long j = 0; j < part.p.ld; j += WIDTH<T>) sums += load(p + j);
        }
        for (int a = 0; a < WIDTH<T>; ++a) sum += sums[a];
        for (auto& part : parts)
            for (long j = 0; j < part.p.ld; ++j) part.p.row(t)[j] /= sum;
    }

    // From `grad_y`, after `forward`: each part's `grad` by its scores; returns the gradient by q in y.
    void backward_queries() {
        for (auto& part : parts) part.times_transposed(tokens, width, grad_y, part.values, part.grad);
        for (long t = 0; t < tokens; ++t) {
            T along = 0;
            for (auto& part : parts) along += dot(part.p.row(t), part.grad.row(t), part.seen(t));
            for (auto& part : parts) {
                T *grad = part.grad.row(t), *p = part.p.row(t);
                for (long j = 0; j < part.seen(t); ++j) grad[j] = p[j] * (grad[j] - along) * scale;
                std::fill(grad + part.seen(t), grad + part.grad.ld, T(0));
            }
        }
        product<T, 3>(tokens, width,
                      {parts[0].forward(parts[0].grad, parts[0].keys), parts[1].forward(parts[1].grad, parts[1].keys),
                       parts[2].forward(parts[2].grad, parts[2].keys)},
                      Zero<T>{}, y.data(), y.ld);
    }

    // After `backward_queries`: in `scratch` [count, width] the gradient by a part's keys, or by its values.
    void backward_keys(KeysPart<T>& part) { part.backward(tokens, width, part.grad, q, scratch); }
    void backward_values(KeysPart<T>& part) { part.backward(tokens, width, part.p, grad_y, scratch); }
};
