#include "../launch.h"

template bool hkdfast::launch_rows(const Task&, bool, generic::JensenShannon, const PlanRequest&, int, void*);
