// What `native.py` hands over for a span of slots: sizes, how to read, and where everything lies.
//
// Tokens are [B, S, H, *], S = `slots`, chunks are `width` slots each, and row r = b * H + h reads a memory of its own.
// Every pointer is to contiguous numbers of one type. The fields are those of `native._Call`, in its order.

#pragma once

template <class T>
struct Call {
    long batch, slots, heads, layers, width, at_boundary, threads, group;
    long activation, has_threshold, surprise;
    double clip, threshold;
    const long* widths;  // [layers + 1]
    const T *q, *k, *v, *theta, *eta, *alpha;
    const unsigned char* present;                  // [B, S], or null: every slot holds a token
    const T *weight, *bias;                        // of the residual form, [B * H, V], or null
    const T *const *anchor, *const *w, *const *s;  // of each layer, [B * H, in, out]
    T *const *last_anchor, *const *new_w, *const *new_s;
    T *y, *loss, *gradient_norm;  // [B, S, H, *], the last two null where not asked for
    // For a backward pass either is given, for groups of `group` chunks each: where the traces of a group lie,
    // [B * H, groups]; or the state at the start of each group but the first, [groups - 1, B * H, state].
    T* const* traces;
    T* starts;
    // back alone: gradients by y, by loss (or null), by the tokens, by weight and bias [B * H, V] (or null), and by the
    // last anchor and the state after, which become those by the first anchor and the state before
    const T *by_y, *by_loss;
    T *by_q, *by_k, *by_v, *by_theta, *by_eta, *by_alpha, *by_weight, *by_bias;
    T *const *by_anchor, *const *by_w, *const *by_s;
};
