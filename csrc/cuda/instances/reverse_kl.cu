#include "../launch.h"

template bool hkdfast::launch_rows(const Task&, bool, generic::ReverseKL, const PlanRequest&, int, void*);
