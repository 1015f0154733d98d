// What surrounds a block's branch, for few rows: the gate of attention and memory, and the residual MLP.

#pragma once
#include "layer_scan.h"
#include "linears.h"

// y = norm(y) * sigmoid(norm(m)), of one row; `room` has place for a row and a vector.
template <class T>
void gated_product(long width, const T* y, const T* m, const T* y_weight, const T* m_weight, double y_eps, double m_eps,
                   T* room, T* output) {
    rms_norm(width, y, y_weight, y_eps, output);
    rms_norm(width, m, m_weight, m_eps, room);
    for (long i = 0; i < width; i += WIDTH<T>) store(room + i, exponential<T>(-load(room + i)));
    for (long i = 0; i < width; ++i) output[i] /= 1 + room[i];
}
