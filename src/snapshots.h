/*-------------------------------------------------------------------------
 *
 * snapshots.h
 *	  Waiting for snapshots that are older than what has been committed.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_SNAPSHOTS_H
#define RM_SNAPSHOTS_H

#include "migration.h"
#include "storage/lock.h"

/* zeroed where nobody has been waited for; its list lives in the step's memory */
typedef struct RmSnapshotWait
{
	VirtualTransactionId *waiting;	/* whose snapshots may be too old */
	int			nwaiting;
	TransactionId oldest;		/* an xmin up to here is of an older snapshot */
	TimestampTz began;
} RmSnapshotWait;

extern bool rm_wait_for_snapshots(RmRun *run, RmSnapshotWait *wait, const char *keeps,
								  const char *why, const char *call);

#endif							/* RM_SNAPSHOTS_H */
