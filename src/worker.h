/*-------------------------------------------------------------------------
 *
 * worker.h
 *	  Background workers: statements that must be top-level, and probes.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_WORKER_H
#define RM_WORKER_H

#include "locks.h"
#include "nodes/pg_list.h"
#include "postmaster/bgworker.h"

/* what is known beforehand of the locks of a statement, and where they are told */
typedef struct RmWorkerLocks
{
	RmLockAccount *account;
	Oid			relid;			/* SHARE UPDATE EXCLUSIVE all the while, or 0 */
	Oid			target;			/* the migration's table */
	int			tables;			/* in its tree */
} RmWorkerLocks;

/*
 * Runs one statement that PostgreSQL accepts only at top level (VACUUM, CREATE
 * INDEX CONCURRENTLY, ...) in a background worker, as the current role, in the
 * current database and with the caller's settings, and waits for its end.
 * what names it in messages.  Errors of the statement are raised here with
 * their SQLSTATE, message, detail and hint; 53000 if no worker can be had.
 * Cancelling the caller cancels the statement.
 *
 * Its locks go into locks->account, also if it fails; locks may be NULL.
 *
 * The caller must hold no snapshot and no lock that the statement needs
 * (asserted: CREATE INDEX CONCURRENTLY would wait for it for ever).
 */
extern void rm_worker_run(const char *sql, const char *what,
						  const RmWorkerLocks *locks);

/* one message, in fields of fixed size; "" is a field that is not there */
typedef struct RmReport
{
	int			sqlerrcode;
	char		message[1024];
	char		detail[2048];
	char		hint[1024];
	char		context[2048];
} RmReport;

/* what other background workers of ours have in common with it */
extern BackgroundWorkerHandle *rm_worker_register(const char *name, const char *type,
												  const char *function, Datum arg,
												  const void *extra, Size extra_size,
												  bool notify, const char *what);
extern List *rm_session_settings(void);
extern void rm_worker_become(Oid role, List *settings, int elevel);
extern void rm_worker_statement(const char *sql);
extern void rm_report_copy(RmReport *report, const ErrorData *edata);
extern void rm_report_repeat(int elevel, const RmReport *report, const char *what);

#endif							/* RM_WORKER_H */
