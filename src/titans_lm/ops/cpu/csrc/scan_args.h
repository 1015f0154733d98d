// The arguments that `native.py` passes for a run of chunks: sizes, options, pointers.
//
// Tokens are [B, S, H, *], S = `slots`. Row r = b * H + h has a memory of its own. Every pointer is to contiguous scalars of
// one type. The fields are those of `native._ScanArgs`, in its order.

#pragma once

template <class T>
struct ScanArgs {
    long batch, slots, heads, layers, chunk_size, at_boundary, threads, group;
    long activation, has_threshold, surprise;
    double clip, threshold;
    const long* widths;  // [layers + 1]
    const T *q, *k, *v, *theta, *eta, *alpha;
    const unsigned char* valid;                    // [B, S], or null: every slot holds a token
    const T *weight, *bias;                        // of the residual form, [B * H, V], or null
    const T *const *anchor, *const *w, *const *s;  // of each layer, [B * H, in, out]
    T *const *last_anchor, *const *new_w, *const *new_s;
    T *y, *loss, *gradient_norm;  // [B, S, H, *], the last two null without surprise
    // A backward pass needs one of these, for groups of `group` chunks: pointers to the saved activations of each group,
    // [B * H, groups]; or the state at the start of each group but the first, [groups - 1, B * H, state size].
    T* const* saved;
    T* starts;
    // For the backward pass alone: gradients by y and the loss (or null), by the tokens, by weight and bias [B * H, V] (or
    // null), and by the last anchor and the state after, which become those by the first anchor and the state before.
    const T *grad_y, *grad_loss;
    T *grad_q, *grad_k, *grad_v, *grad_theta, *grad_eta, *grad_alpha, *grad_weight, *grad_bias;
    T *const *grad_anchor, *const *grad_w, *const *grad_s;
};
