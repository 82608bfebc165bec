/*-------------------------------------------------------------------------
 *
 * steer.c
 *	  Whole migrations, in the foreground and the background, and steering.
 *
 *	CALL rm_alter_type(...)		all steps of a method, here
 *	rm_start(...)				the same in a background worker
 *	CALL rm_cut_over(id)		goes on where cut_over => 'manual' has stopped
 *	rm_pause(id), rm_resume(id), rm_cancel(id)
 *
 * "All steps" are those of the method's list that are not on_request.  They
 * run one after the other, each by the step runner, in one session that stays
 * the migration's runner between them.
 *
 * A background worker runs the very statement that a client could:
 *
 *	  rm_start(), rm_resume()					worker
 *	  parse, refuse, write the rows,
 *	  ask for a worker	------------------->	connect as the session's user
 *	  commit			- - - - - - - - - ->	wait for that transaction's end
 *												read the row, become the role,
 *												take over the settings
 *												CALL risky_migrations.run(id)
 *
 * How a migration is to be run, and what is wanted of its runner, is a row of
 * the table steering.  It is not the migration's own row because that one is
 * locked by the runner for as long as its transaction lasts: rm_pause() would
 * wait for an ALTER TABLE to end before it could say that it is not wanted any
 * more, and the runner for whoever has called rm_pause() and not committed.
 * The runner only reads it: whenever it loads the state row, and when it is
 * woken or interrupted.
 *
 * When a request commits, the session that made it wakes the runner (its
 * latch), and where that is not enough interrupts it as pg_cancel_backend()
 * would: rm_cancel() always, rm_pause() when the runner waits for a lock.  The
 * runner rolls its transaction back, sees from the table why, and obeys.
 *
 * What is wanted stays: a paused migration waits also in a call that comes
 * later, a cancelled one is not started again by the launcher.  rm_resume()
 * ends both; a call of a step by hand ends a cancellation.
 *
 * Easy to get wrong:
 *
 * - A signal before the commit.  The runner would look, see nothing and go on,
 *	 or take the interrupt for the user's.  So signals are kept until the commit
 *	 and dropped with a subtransaction that is rolled back.  If a signal gets
 *	 lost all the same (a prepared transaction), the runner looks with its next
 *	 transaction, and a pause looks twice a second.
 *
 * - A signal to one who is not the runner any more.  The lock table says who
 *	 the runner is at that moment.  Between this look and the kill() there is
 *	 the same gap as in pg_cancel_backend().
 *
 * - Two workers for one migration (the launcher's and rm_resume()'s).  The
 *	 runner's lock lets one in, the other one goes without a word.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "access/transam.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "choose.h"
#include "compat.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "risky_migrations.h"
#include "state.h"
#include "steer.h"
#include "steps.h"
#include "storage/latch.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "tcop/tcopprot.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "worker.h"

/* how often a paused runner looks by itself, milliseconds */
#define PAUSE_LOOK 500

PG_FUNCTION_INFO_V1(rm_alter_type);
PG_FUNCTION_INFO_V1(rm_alter_types);
PG_FUNCTION_INFO_V1(rm_cut_over);
PG_FUNCTION_INFO_V1(rm_run);
PG_FUNCTION_INFO_V1(rm_start);
PG_FUNCTION_INFO_V1(rm_start_types);
PG_FUNCTION_INFO_V1(rm_pause);
PG_FUNCTION_INFO_V1(rm_resume);
PG_FUNCTION_INFO_V1(rm_cancel);
PG_FUNCTION_INFO_V1(rm_step_name);

PGDLLEXPORT void rm_runner_main(Datum main_arg);

/* is this process a background worker that runs a migration? */
static bool in_background = false;

/*-------------------------------------------------------------------------
 * What is wanted, as the runner sees it
 *-------------------------------------------------------------------------
 */

/* what is wanted of a migration's runner, and by whom */
typedef struct Wish
{
	int64		id;
	RmWanted	wanted;
	char		role[NAMEDATALEN];	/* its name, or what is left of it */
} Wish;

static void
read_wish(void *arg)
{
	Wish	   *wish = arg;
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(wish->id)};

	wish->wanted = RM_WANT_RUN;
	wish->role[0] = '\0';
	rm_state_execute("SELECT wanted, pg_catalog.pg_get_userbyid(wanted_by)::text"
					 " FROM risky_migrations.steering WHERE migration_id = $1",
					 1, types, v, NULL);
	if (SPI_processed == 0)
		return;
	wish->wanted = rm_wanted_by_name(rm_result_text(0, 1));
	if (!rm_result_isnull(0, 2))
		strlcpy(wish->role, rm_result_text(0, 2), sizeof(wish->role));
}

/*
 * Reads it in a transaction of its own, so that nothing is held afterwards.  If
 * that fails, all is as it was: the next transaction of the step will tell.
 */
static void
look_up_wish(RmRun *run, Wish *wish)
{
	ErrorData  *error;

	wish->id = run->migration_id;
	wish->wanted = RM_WANT_RUN;
	if (wish->id == 0)
		return;
	error = rm_try(read_wish, wish, run->cxt);
	rm_commit();
	InvalidateCatalogSnapshot();
	if (error == NULL)
		return;
	wish->wanted = RM_WANT_RUN;
	if (error->sqlerrcode == ERRCODE_QUERY_CANCELED)
	{
		/* it was not meant for this: let it come again where it is handled */
		InterruptPending = true;
		QueryCancelPending = true;
	}
	FreeErrorData(error);
}

/* what is wanted of the runner now; between two transactions */
RmWanted
rm_steer_wanted(RmRun *run)
{
	Wish		wish;

	look_up_wish(run, &wish);
	return wish.wanted;
}

/*
 * Has a request interrupted what was under way?  Then there is nothing to
 * report: the next transaction will see it.  The transaction was rolled back.
 */
bool
rm_steer_interrupted(RmRun *run, ErrorData *error)
{
	return error->sqlerrcode == ERRCODE_QUERY_CANCELED && !run->revert &&
		rm_steer_wanted(run) != RM_WANT_RUN;
}

static void
raise_cancelled(void *arg)
{
	Wish	   *wish = arg;

	ereport(ERROR,
			(errcode(ERRCODE_QUERY_CANCELED),
			 errmsg("migration %lld was cancelled by role \"%s\"",
					(long long) wish->id, wish->role),
			 errdetail("What is done stays, and the table can be used as before."),
			 errhint("SELECT rm_resume(%lld) goes on with it, CALL rm_rollback(%lld) takes it back.",
					 (long long) wish->id, (long long) wish->id)));
}

/*
 * The runner has seen that something else is wanted of it.  Waits, holding
 * nothing, as long as the migration is paused.  NULL when it is to run, else
 * the error with which it ends, in the step's memory.
 */
ErrorData *
rm_steer_obey(RmRun *run)
{
	ErrorData  *interrupt = NULL;
	bool		told = false;

	for (;;)
	{
		Wish		wish;

		look_up_wish(run, &wish);
		if (wish.wanted == RM_WANT_CANCELLED)
			return rm_try(raise_cancelled, &wish, run->cxt);
		if (interrupt)
			return interrupt;
		if (wish.wanted == RM_WANT_RUN)
			break;
		if (!told)
			ereport(NOTICE,
					(errmsg("migration %lld is paused by role \"%s\"",
							(long long) wish.id, wish.role),
					 errhint("SELECT rm_resume(%lld) goes on with it.",
							 (long long) wish.id)));
		told = true;
		(void) rm_wait_latch(PAUSE_LOOK, run->cxt, &interrupt);
	}
	if (told)
		ereport(NOTICE,
				(errmsg("migration %lld goes on", (long long) run->migration_id)));
	return NULL;
}

static void
begin_run(void *arg)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(*(int64 *) arg)};

	rm_state_execute("UPDATE risky_migrations.steering SET background = false,"
					 " wanted = CASE wanted WHEN 'cancelled' THEN 'run' ELSE wanted END"
					 " WHERE migration_id = $1 AND (background OR wanted = 'cancelled')",
					 1, types, v, NULL);
}

/*
 * This session begins to run the migration; it is the runner.  In the foreground
 * somebody has just said that he wants it run here: that ends an earlier
 * cancellation, but not a pause.
 */
void
rm_steer_begin(int64 id)
{
	if (!in_background)
		rm_transaction(begin_run, &id);
}

/*-------------------------------------------------------------------------
 * All steps
 *-------------------------------------------------------------------------
 */

/* how a migration is to be run, read with the migration */
typedef struct Order
{
	int64		id;				/* 0: the only open one */
	MemoryContext cxt;
	RmMigration *m;
	bool		manual_cut_over;
	int			batch;
} Order;

static void
read_order(void *arg)
{
	Order	   *order = arg;
	Oid			types[] = {INT8OID};
	Datum		v[1];

	if (order->id == 0)
		order->id = rm_open_migration(NULL);
	order->m = rm_migration_resolve(order->id, order->cxt);
	v[0] = Int64GetDatum(order->id);
	rm_state_execute("SELECT cut_over = 'manual', batch::int8"
					 " FROM risky_migrations.steering WHERE migration_id = $1",
					 1, types, v, NULL);
	order->manual_cut_over = SPI_processed > 0 && DatumGetBool(rm_result_datum(0, 1));
	order->batch = SPI_processed > 0 ? rm_result_int64(0, 2) : RM_DEFAULT_BATCH;
}

/* the step after those that are done, if it runs by itself; else NULL */
static const RmStep *
next_step(const RmMethod *method, int steps_done, bool manual_cut_over)
{
	const RmStep *step;

	if (steps_done >= method->nsteps)
		return NULL;
	step = method->steps[steps_done];
	if (step->on_request ||
		(manual_cut_over && step->cuts_over))
		return NULL;
	return step;
}

bool
rm_steer_has_next_step(const char *method, int steps_done, bool manual_cut_over)
{
	return next_step(rm_method_by_name(method), steps_done, manual_cut_over) != NULL;
}

/* is the cut-over all that is missing? */
static bool
stands_before_cut_over(const RmMigration *m)
{
	return m->steps_done < m->method->nsteps &&
		m->method->steps[m->steps_done]->cuts_over;
}

static void
notice_end(const Order *order)
{
	RmMigration *m = order->m;

	if (order->manual_cut_over && stands_before_cut_over(m))
		ereport(NOTICE,
				(errmsg("migration %lld is ready for its cut-over", (long long) m->id),
				 errhint("CALL rm_cut_over(%lld) goes on.", (long long) m->id)));
	else
		ereport(NOTICE,
				(errmsg("migration %lld: %d of %d steps of the method %s are done",
						(long long) m->id, m->steps_done, m->method->nsteps,
						m->method->name)));
}

/*
 * Runs all steps from where the migration stands.  Of a new one the failure of
 * the first step closes it.  The errors are those of the steps.
 */
static void
run_all_steps(int64 id, bool is_new)
{
	Order		order = {.id = id,.cxt = CurrentMemoryContext};

	rm_transaction(read_order, &order);
	rm_become_runner(order.m);
	PG_TRY();
	{
		if (is_new)
			rm_migration_first_step(order.m, order.batch);
		else
			rm_steer_begin(id);
		for (;;)
		{
			rm_transaction(read_order, &order);
			if (strcmp(order.m->state, "open") != 0 ||
				next_step(order.m->method, order.m->steps_done, order.manual_cut_over) == NULL)
				break;
			rm_run_step(order.m, order.m->steps_done, false, order.batch);
		}
	}
	PG_FINALLY();
	{
		rm_runner_unlock(RM_RUNNER_MIGRATION, id);
	}
	PG_END_TRY();
	notice_end(&order);
}

/*-------------------------------------------------------------------------
 * Starting one
 *-------------------------------------------------------------------------
 */

/* one of two words (22023) */
static bool
is_second_word(FunctionCallInfo fcinfo, int arg, const char *name,
			   const char *first, const char *second)
{
	char	   *word = rm_text_argument(fcinfo, arg, name);

	if (strcmp(word, first) != 0 && strcmp(word, second) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("unknown %s \"%s\"", name, word),
				 errdetail("It must be \"%s\" or \"%s\".", first, second),
				 errhint("Give one of these, or leave it out for \"%s\".", first)));
	return strcmp(word, second) == 0;
}

/* NULL for auto: the method is still to be chosen */
static const RmMethod *
method_argument(FunctionCallInfo fcinfo, int arg)
{
	char	   *name = rm_text_argument(fcinfo, arg, "method");

	if (strcmp(name, "auto") == 0)
		return NULL;
	if (strcmp(name, rm_method_direct.name) != 0 &&
		strcmp(name, rm_method_three_step.name) != 0 &&
		strcmp(name, rm_method_online_rewrite.name) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("unknown method \"%s\"", name),
				 errdetail("There are three_step and online_rewrite, which let everybody go on, and direct, which locks the table; auto chooses one of them."),
				 errhint("Give one of these.")));
	return rm_method_by_name(name);
}

static const char *
optional_text(FunctionCallInfo fcinfo, int arg, const char *name)
{
	return PG_ARGISNULL(arg) ? NULL : rm_text_argument(fcinfo, arg, name);
}

/* the arguments of rm_alter_type() and rm_start(), which are the same */
static void
read_arguments(FunctionCallInfo fcinfo, RmMigrationSpec *spec)
{
	const char *relation = rm_text_argument(fcinfo, 0, "relation");
	const RmMethod *method;

	spec->column = rm_text_argument(fcinfo, 1, "column_name");
	spec->new_type = rm_text_argument(fcinfo, 2, "new_type");
	spec->using_expr = optional_text(fcinfo, 3, "using_expr");
	method = method_argument(fcinfo, 4);
	spec->reverse_expr = optional_text(fcinfo, 5, "reverse_expr");
	spec->manual_cut_over = is_second_word(fcinfo, 6, "cut_over", "auto", "manual");
	spec->null_on_error = is_second_word(fcinfo, 7, "on_error", "stop", "null");
	spec->batch = (int) rm_count_argument(fcinfo, 8, "batch", 1, RM_MAX_BATCH);
	spec->all_steps = true;

	if (method)
		rm_spec_use_method(spec, method);
	if (spec->reverse_expr)
		rm_conversion_check_text(spec->reverse_expr, "the reverse expression");
	spec->relid = rm_find_relation(relation);
}

/* for how a change is given to rm_alter_types() */
static void
refuse_changes(const char *detail)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("changes are not what they should be"),
			 errdetail("%s", detail),
			 errhint("Give an object of column names and types, such as {\"id\": \"bigint\", \"at\": {\"type\": \"timestamptz\", \"using\": \"at AT TIME ZONE 'UTC'\"}}; {} to write the table anew.")));
}

static char *
string_of(const JsonbValue *v)
{
	return pnstrdup(v->val.string.val, v->val.string.len);
}

/* the value of one column: its type, or an object of type and using */
static RmColumnSpec *
read_change(JsonbIterator **it, JsonbIteratorToken token, JsonbValue *v, const char *column)
{
	RmColumnSpec *c = palloc0(sizeof(RmColumnSpec));

	c->column = column;
	if (token == WJB_VALUE && v->type == jbvString)
		c->new_type = string_of(v);
	else if (token != WJB_BEGIN_OBJECT)
		refuse_changes(psprintf("What is given for column \"%s\" is neither a type nor an object.", column));
	else
		while (JsonbIteratorNext(it, v, false) != WJB_END_OBJECT)
		{
			char	   *key = string_of(v);
			const char **field = strcmp(key, "type") == 0 ? &c->new_type :
				strcmp(key, "using") == 0 ? &c->using_expr : NULL;

			if (field == NULL)
				refuse_changes(psprintf("Column \"%s\" is given a \"%s\"; there are \"type\" and \"using\".",
										column, key));
			if (JsonbIteratorNext(it, v, true) != WJB_VALUE || v->type != jbvString)
				refuse_changes(psprintf("The \"%s\" of column \"%s\" is not a string.", key, column));
			*field = string_of(v);
		}
	if (c->new_type == NULL || c->new_type[0] == '\0')
		refuse_changes(psprintf("Column \"%s\" is given no type.", column));
	return c;
}

/* the columns of an object; the first one as rm_alter_type() has it */
static void
read_changes(FunctionCallInfo fcinfo, int arg, RmMigrationSpec *spec)
{
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	v;

	if (PG_ARGISNULL(arg))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("changes must not be NULL"),
				 errdetail("The call does not say which columns are meant."),
				 errhint("Give an object of column names and types; {} to write the table anew.")));
	it = JsonbIteratorInit(&PG_GETARG_JSONB_P(arg)->root);
	if (JsonbIteratorNext(&it, &v, false) != WJB_BEGIN_OBJECT)
		refuse_changes("It is not an object.");
	while ((token = JsonbIteratorNext(&it, &v, false)) == WJB_KEY)
	{
		char	   *column = string_of(&v);
		RmColumnSpec *c;

		token = JsonbIteratorNext(&it, &v, false);
		c = read_change(&it, token, &v, column);
		if (spec->column)
		{
			spec->further = lappend(spec->further, c);
			continue;
		}
		spec->column = c->column;
		spec->new_type = c->new_type;
		spec->using_expr = c->using_expr;
	}
}

/* the arguments of rm_alter_types() and of rm_start() that takes the same */
static void
read_types_arguments(FunctionCallInfo fcinfo, RmMigrationSpec *spec)
{
	const char *relation = rm_text_argument(fcinfo, 0, "relation");
	const RmMethod *method;

	read_changes(fcinfo, 1, spec);
	method = method_argument(fcinfo, 2);
	spec->manual_cut_over = is_second_word(fcinfo, 3, "cut_over", "auto", "manual");
	spec->batch = (int) rm_count_argument(fcinfo, 4, "batch", 1, RM_MAX_BATCH);
	spec->all_steps = true;
	if (method)
		rm_spec_use_method(spec, method);
	spec->relid = rm_find_relation(relation);
}

/* writes down how a new migration is to be run; needs SPI */
void
rm_steer_order(const RmMigration *m, const RmMigrationSpec *spec)
{
	Oid			types[] = {INT8OID, TEXTOID, INT8OID, BOOLOID, OIDOID, OIDOID, TEXTARRAYOID};
	Datum		v[lengthof(types)];

	v[0] = Int64GetDatum(m->id);
	v[1] = CStringGetTextDatum(spec->manual_cut_over ? "manual" : "auto");
	v[2] = Int64GetDatum(spec->batch);
	v[3] = BoolGetDatum(spec->background);
	v[4] = ObjectIdGetDatum(GetSessionUserId());
	v[5] = ObjectIdGetDatum(GetUserId());
	v[6] = rm_settings_array(rm_session_settings());
	rm_state_execute("INSERT INTO risky_migrations.steering (migration_id, all_steps,"
					 " cut_over, batch, background, session_role, role, settings)"
					 " VALUES ($1, true, $2, $3, $4, $5, $6, $7)",
					 lengthof(types), types, v, NULL);
}

/* a method that is still to be chosen, in a transaction of its own */
typedef struct Chooser
{
	RmMigrationSpec *spec;
	MemoryContext cxt;
} Chooser;

static void
choose_method(void *arg)
{
	Chooser    *c = arg;

	rm_choose_method(c->spec, c->cxt);
}

/* starts what is asked for and runs all of its steps */
static void
run_new(RmMigrationSpec *spec)
{
	if (spec->method == NULL)
		rm_transaction(choose_method, &(Chooser) {.spec = spec,.cxt = CurrentMemoryContext});
	run_all_steps(rm_migration_new(spec)->id, true);
}

/*
 * rm_alter_type(relation text, column_name text, new_type text, using_expr text,
 *				 method text, reverse_expr text, cut_over text, on_error text,
 *				 batch bigint)
 */
Datum
rm_alter_type(PG_FUNCTION_ARGS)
{
	RmMigrationSpec spec = {0};

	rm_procedure_begin(fcinfo, "rm_alter_type");
	read_arguments(fcinfo, &spec);
	run_new(&spec);
	rm_procedure_end();
	PG_RETURN_VOID();
}

/*
 * rm_alter_types(relation text, changes jsonb, method text, cut_over text,
 *				  batch bigint)
 */
Datum
rm_alter_types(PG_FUNCTION_ARGS)
{
	RmMigrationSpec spec = {0};

	rm_procedure_begin(fcinfo, "rm_alter_types");
	read_types_arguments(fcinfo, &spec);
	run_new(&spec);
	rm_procedure_end();
	PG_RETURN_VOID();
}

/*
 * risky_migrations.run(migration bigint)
 */
Datum
rm_run(PG_FUNCTION_ARGS)
{
	rm_procedure_begin(fcinfo, "risky_migrations.run");
	run_all_steps(rm_count_argument(fcinfo, 0, "migration", 1, PG_INT64_MAX), false);
	rm_procedure_end();
	PG_RETURN_VOID();
}

static void
set_automatic_cut_over(void *arg)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(((Order *) arg)->id)};

	rm_state_execute("UPDATE risky_migrations.steering SET cut_over = 'auto'"
					 " WHERE migration_id = $1", 1, types, v, NULL);
}

/* the id that was given, 0 for the only open one */
static int64
migration_argument(FunctionCallInfo fcinfo, int arg)
{
	return PG_ARGISNULL(arg) ? 0 :
		rm_count_argument(fcinfo, arg, "migration", 1, PG_INT64_MAX);
}

/*
 * rm_cut_over(migration bigint)
 */
Datum
rm_cut_over(PG_FUNCTION_ARGS)
{
	Order		order = {.cxt = CurrentMemoryContext};

	rm_procedure_begin(fcinfo, "rm_cut_over");
	order.cxt = CurrentMemoryContext;
	order.id = migration_argument(fcinfo, 0);
	rm_transaction(read_order, &order);
	if (strcmp(order.m->state, "open") != 0 || !stands_before_cut_over(order.m))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("migration %lld is not ready for a cut-over", (long long) order.id),
				 errdetail("It is %s, %d of %d steps of the method %s are done.",
						   order.m->state, order.m->steps_done,
						   order.m->method->nsteps, order.m->method->name),
				 errhint("SELECT * FROM rm_migrations says what to call next.")));
	rm_transaction(set_automatic_cut_over, &order);
	run_all_steps(order.id, false);
	rm_procedure_end();
	PG_RETURN_VOID();
}

/*
 * risky_migrations.step_name(method text, steps_done integer) returns text
 *
 * Name of the method's next step, NULL if there is none.
 */
Datum
rm_step_name(PG_FUNCTION_ARGS)
{
	const RmMethod *method = rm_method_by_name(text_to_cstring(PG_GETARG_TEXT_PP(0)));
	int			steps_done = PG_GETARG_INT32(1);

	if (steps_done < 0 || steps_done >= method->nsteps)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(method->steps[steps_done]->name));
}

/*-------------------------------------------------------------------------
 * In the background
 *-------------------------------------------------------------------------
 */

/* what the starter tells the worker; the rest is in the table */
typedef struct WorkerOrder
{
	int64		id;
	Oid			database;
	Oid			session_user;
	TransactionId starter;		/* whose commit it waits for, or invalid */
} WorkerOrder;

StaticAssertDecl(sizeof(WorkerOrder) <= BGW_EXTRALEN,
				 "order of a migration's worker does not fit into bgw_extra");

/*
 * Asks for a worker that runs the migration as its row says, when the starter's
 * transaction has committed.  If there is none: 53000, or false without a what.
 */
bool
rm_steer_launch(int64 id, Oid session_user, TransactionId starter, const char *what)
{
	WorkerOrder order;

	memset(&order, 0, sizeof(order));
	order.id = id;
	order.database = MyDatabaseId;
	order.session_user = session_user;
	order.starter = starter;
	return rm_worker_register(psprintf("risky_migrations migration %lld", (long long) id),
							  "risky_migrations runner", "rm_runner_main", (Datum) 0,
							  &order, sizeof(order), false, what) != NULL;
}

/* how the worker is to run the migration */
typedef struct WorkerPlan
{
	int64		id;
	MemoryContext cxt;
	bool		found;
	Oid			role;
	List	   *settings;
} WorkerPlan;

static void
read_plan(void *arg)
{
	WorkerPlan *plan = arg;
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(plan->id)};
	MemoryContext oldcxt;

	if (!OidIsValid(rm_state_relid("steering", true)))
		return;
	rm_state_execute("SELECT s.role::int8, s.settings FROM risky_migrations.steering s"
					 " JOIN risky_migrations.migration m ON m.id = s.migration_id"
					 " WHERE m.id = $1 AND m.state = 'open' AND s.background",
					 1, types, v, NULL);
	if (SPI_processed == 0)
		return;
	oldcxt = MemoryContextSwitchTo(plan->cxt);
	plan->found = true;
	plan->role = rm_result_int64(0, 1);
	plan->settings = rm_settings_list(rm_result_datum(0, 2));
	MemoryContextSwitchTo(oldcxt);
}

/* runs work in a transaction, as the session's user */
static void
in_transaction(void (*work) (void *arg), void *arg)
{
	StartTransactionCommand();
	SPI_connect();
	PushActiveSnapshot(GetTransactionSnapshot());
	work(arg);
	PopActiveSnapshot();
	SPI_finish();
	CommitTransactionCommand();
}

/* does another process run it already? */
static void
is_running(void *arg)
{
	WorkerPlan *plan = arg;

	if (rm_runner_pid(RM_RUNNER_MIGRATION, plan->id) != 0)
		plan->found = false;
}

/*
 * Waits for the end of the starter's transaction, however long that lasts: limits
 * that the role or the server has are about other waits.
 */
static void
wait_for_starter(TransactionId starter)
{
	StartTransactionCommand();
	(void) set_config_option("lock_timeout", "0", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	if (GetConfigOption("transaction_timeout", true, false) != NULL)
		(void) set_config_option("transaction_timeout", "0", PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_LOCAL, true, 0, false);
	XactLockTableWait(starter, NULL, NULL, XLTW_None);
	CommitTransactionCommand();
}

/*
 * Entry point of the worker.  An error ends it; the runner has recorded it, and
 * here it goes to the server's log, as do the notices.
 */
void
rm_runner_main(Datum main_arg)
{
	WorkerOrder order;
	WorkerPlan	plan = {0};
	List	   *settings;

	memcpy(&order, MyBgworkerEntry->bgw_extra, sizeof(order));
	pqsignal(SIGTERM, die);
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(order.database, order.session_user,
											  RM_WORKER_CONNECT_FLAGS);
	in_background = true;
	plan.id = order.id;
	plan.cxt = AllocSetContextCreate(TopMemoryContext, "rm migration in the background",
									 ALLOCSET_SMALL_SIZES);

	if (TransactionIdIsValid(order.starter))
		wait_for_starter(order.starter);
	in_transaction(read_plan, &plan);
	if (plan.found)
		in_transaction(is_running, &plan);
	if (!plan.found)
		return;

	MemoryContextSwitchTo(plan.cxt);
	settings = lappend(plan.settings, "log_min_messages=notice");
	if (GetConfigOption("transaction_timeout", true, false) != NULL)
		settings = lappend(settings, "transaction_timeout=0");
	settings = lappend(settings, psprintf("application_name=risky_migrations migration %lld",
										  (long long) order.id));
	rm_worker_become(plan.role, settings, WARNING);
	rm_worker_statement(psprintf("CALL " RM_SCHEMA ".run(%lld)", (long long) order.id));
}

/* refuses where no worker could be started, or not write (before anything else) */
static void
check_background(const char *name)
{
	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("%s() cannot run during recovery", name),
				 errdetail("A standby writes nothing of its own."),
				 errhint("Run it on the primary server.")));
	if (XactReadOnly)
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("cannot execute %s() in a read-only transaction", name),
				 errdetail("It writes down what is wanted."),
				 errhint("Call it in a transaction that is READ WRITE.")));
	if (InSecurityRestrictedOperation())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("cannot call %s() within a security-restricted operation", name),
				 errdetail("It would act outside of it."),
				 errhint("Call it as a statement of its own.")));
}

static void
check_session_user(void)
{
	if (!rm_worker_can_be(GetSessionUserId()))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("a migration in the background cannot connect as role \"%s\"",
						GetUserNameFromId(GetSessionUserId(), false)),
				 errdetail("Before PostgreSQL 17 a background worker needs the attribute LOGIN."),
				 errhint("Connect as a role that may log in, then SET ROLE.")));
}

/* may this call start a migration in the background? */
static void
check_start(void)
{
	check_background("rm_start");
	check_session_user();
	(void) rm_state_relid("migration", false);
}

/*
 * Everything is refused here; the worker begins when this transaction commits.
 * Returns the migration's id.
 */
static int64
start_new(RmMigrationSpec *spec)
{
	int64		id;

	spec->background = true;
	SPI_connect();
	if (spec->method == NULL)
		rm_choose_method(spec, CurrentMemoryContext);
	id = rm_migration_create(spec, CurrentMemoryContext)->id;
	(void) rm_steer_launch(id, GetSessionUserId(), GetTopTransactionId(), "a migration");
	SPI_finish();
	return id;
}

/*
 * rm_start(as rm_alter_type) returns bigint
 */
Datum
rm_start(PG_FUNCTION_ARGS)
{
	RmMigrationSpec spec = {0};

	check_start();
	read_arguments(fcinfo, &spec);
	PG_RETURN_INT64(start_new(&spec));
}

/*
 * rm_start(as rm_alter_types) returns bigint
 */
Datum
rm_start_types(PG_FUNCTION_ARGS)
{
	RmMigrationSpec spec = {0};

	check_start();
	read_types_arguments(fcinfo, &spec);
	PG_RETURN_INT64(start_new(&spec));
}

/*-------------------------------------------------------------------------
 * Waking the runner
 *-------------------------------------------------------------------------
 */

typedef enum Signal
{
	WAKE,						/* set its latch */
	INTERRUPT_WAIT,				/* and cancel its wait for a lock */
	INTERRUPT					/* and cancel whatever it does */
} Signal;

/* a signal that is sent when the transaction commits */
typedef struct PendingSignal
{
	int64		id;				/* of the migration */
	Signal		signal;
	SubTransactionId subid;
} PendingSignal;

static List *pending = NIL;		/* in TopTransactionContext */

static void
send_signal(const PendingSignal *p)
{
	int			pid = rm_runner_pid(RM_RUNNER_MIGRATION, p->id);
	PGPROC	   *proc = pid ? BackendPidGetProc(pid) : NULL;

	if (proc == NULL || pid == MyProcPid)
		return;
	SetLatch(&proc->procLatch);
	if (p->signal == INTERRUPT ||
		(p->signal == INTERRUPT_WAIT && proc->waitLock != NULL))
		kill(pid, SIGINT);
}

static void
at_transaction_end(XactEvent event, void *arg)
{
	ListCell   *lc;

	if (event == XACT_EVENT_COMMIT)
		foreach(lc, pending)
			send_signal(lfirst(lc));
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT ||
		event == XACT_EVENT_PREPARE)
		pending = NIL;
}

static void
at_subtransaction_end(SubXactEvent event, SubTransactionId subid,
					  SubTransactionId parent, void *arg)
{
	ListCell   *lc;

	if (event == SUBXACT_EVENT_ABORT_SUB)
		foreach(lc, pending)
			if (((PendingSignal *) lfirst(lc))->subid >= subid)
				pending = foreach_delete_current(pending, lc);
}

static void
signal_at_commit(int64 id, Signal signal)
{
	static bool registered = false;
	MemoryContext oldcxt = MemoryContextSwitchTo(TopTransactionContext);
	PendingSignal *p = palloc(sizeof(PendingSignal));

	if (!registered)
	{
		RegisterXactCallback(at_transaction_end, NULL);
		RegisterSubXactCallback(at_subtransaction_end, NULL);
		registered = true;
	}
	p->id = id;
	p->signal = signal;
	p->subid = GetCurrentSubTransactionId();
	pending = lappend(pending, p);
	MemoryContextSwitchTo(oldcxt);
}

/*-------------------------------------------------------------------------
 * rm_pause, rm_resume, rm_cancel
 *-------------------------------------------------------------------------
 */

/* the migration that is meant: open, and the caller's to steer; needs SPI */
static RmMigration *
steerable_migration(FunctionCallInfo fcinfo, const char *name)
{
	Order		order = {.cxt = CurrentMemoryContext};

	check_background(name);
	(void) rm_state_relid("migration", false);
	order.id = migration_argument(fcinfo, 0);
	read_order(&order);
	if (strcmp(order.m->state, "open") != 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("migration %lld is not open", (long long) order.id),
				 errdetail("It is %s.", order.m->state),
				 errhint("SELECT * FROM rm_migrations shows which ones are.")));
	return order.m;
}

static void
set_wanted(int64 id, const char *wanted)
{
	Oid			types[] = {INT8OID, TEXTOID, OIDOID};
	Datum		v[] = {Int64GetDatum(id), CStringGetTextDatum(wanted),
	ObjectIdGetDatum(GetUserId())};

	rm_state_execute("INSERT INTO risky_migrations.steering"
					 " (migration_id, wanted, wanted_by, wanted_at)"
					 " VALUES ($1, $2, $3, pg_catalog.clock_timestamp())"
					 " ON CONFLICT (migration_id) DO UPDATE SET wanted = excluded.wanted,"
					 " wanted_by = excluded.wanted_by, wanted_at = excluded.wanted_at",
					 lengthof(types), types, v, NULL);
}

/* a rollback that was begun is not steered (55000); needs SPI */
static void
refuse_rollback_under_way(const RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("SELECT direction = 'rollback' AND state <> 'done'"
					 " FROM risky_migrations.step_log WHERE migration_id = $1"
					 " ORDER BY id DESC LIMIT 1", 1, types, v, NULL);
	if (SPI_processed > 0 && DatumGetBool(rm_result_datum(0, 1)))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("migration %lld is being rolled back", (long long) m->id),
				 errdetail("A rollback was begun and has not come to its end."),
				 errhint("CALL rm_rollback(%lld) goes on with it where nobody runs it.",
						 (long long) m->id)));
}

/*
 * rm_pause(migration bigint) returns bigint
 */
Datum
rm_pause(PG_FUNCTION_ARGS)
{
	RmMigration *m;
	int64		id;

	SPI_connect();
	m = steerable_migration(fcinfo, "rm_pause");
	id = m->id;
	refuse_rollback_under_way(m);
	if (m->wanted == RM_WANT_PAUSED)
		ereport(NOTICE,
				(errmsg("migration %lld is paused already", (long long) m->id)));
	else if (m->wanted == RM_WANT_CANCELLED)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("migration %lld is cancelled", (long long) m->id),
				 errdetail("Nobody runs it, or whoever does is about to stop."),
				 errhint("SELECT rm_resume(%lld) goes on with it, CALL rm_rollback(%lld) takes it back.",
						 (long long) m->id, (long long) m->id)));
	else
	{
		set_wanted(m->id, "paused");
		if (rm_runner_pid(RM_RUNNER_MIGRATION, m->id) == 0)
			ereport(NOTICE,
					(errmsg("nobody runs migration %lld: what is called of it will wait for rm_resume(%lld)",
							(long long) m->id, (long long) m->id)));
		signal_at_commit(m->id, INTERRUPT_WAIT);
	}
	SPI_finish();
	PG_RETURN_INT64(id);
}

/*
 * rm_cancel(migration bigint) returns bigint
 */
Datum
rm_cancel(PG_FUNCTION_ARGS)
{
	RmMigration *m;
	int64		id;

	SPI_connect();
	m = steerable_migration(fcinfo, "rm_cancel");
	id = m->id;
	refuse_rollback_under_way(m);
	if (rm_runner_pid(RM_RUNNER_MIGRATION, m->id) == 0)
		ereport(NOTICE,
				(errmsg("nobody runs migration %lld", (long long) m->id),
				 errdetail("It will not be started again by itself. Nothing of it was taken back."),
				 errhint("SELECT rm_resume(%lld) goes on with it, CALL rm_rollback(%lld) takes it back.",
						 (long long) m->id, (long long) m->id)));
	set_wanted(m->id, "cancelled");
	signal_at_commit(m->id, INTERRUPT);
	SPI_finish();
	PG_RETURN_INT64(id);
}

/* nobody runs it: a worker does, as the caller; needs SPI */
static void
resume_in_background(const RmMigration *m)
{
	Oid			types[] = {INT8OID, OIDOID, OIDOID, TEXTARRAYOID};
	Datum		v[lengthof(types)];

	check_session_user();
	v[0] = Int64GetDatum(m->id);
	v[1] = ObjectIdGetDatum(GetSessionUserId());
	v[2] = ObjectIdGetDatum(GetUserId());
	v[3] = rm_settings_array(rm_session_settings());
	rm_state_execute("INSERT INTO risky_migrations.steering AS s (migration_id, all_steps,"
					 " background, session_role, role, settings)"
					 " VALUES ($1, true, true, $2, $3, $4)"
					 " ON CONFLICT (migration_id) DO UPDATE SET wanted = 'run', all_steps = true,"
					 " background = true, session_role = excluded.session_role,"
					 " role = excluded.role, settings = excluded.settings,"
					 " launches = 0, launch_mark = NULL",
					 lengthof(types), types, v, NULL);
	(void) rm_steer_launch(m->id, GetSessionUserId(), GetTopTransactionId(),
						   "a migration");
}

/*
 * rm_resume(migration bigint) returns bigint
 *
 * Ends a pause; what nobody runs goes on in a background worker, which begins
 * when this transaction commits.
 */
Datum
rm_resume(PG_FUNCTION_ARGS)
{
	RmMigration *m;
	int64		id;
	int			pid;
	Order		order;

	SPI_connect();
	m = steerable_migration(fcinfo, "rm_resume");
	id = m->id;
	refuse_rollback_under_way(m);
	pid = rm_runner_pid(RM_RUNNER_MIGRATION, m->id);
	order.id = m->id;
	order.cxt = CurrentMemoryContext;
	read_order(&order);
	if (pid != 0 && m->wanted == RM_WANT_CANCELLED)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("migration %lld is just being cancelled", (long long) m->id),
				 errdetail("Process %d still runs it.", pid),
				 errhint("Call it again in a moment.")));
	else if (pid != 0 && m->wanted == RM_WANT_RUN)
		ereport(NOTICE,
				(errmsg("migration %lld is running and not paused", (long long) m->id),
				 errdetail("Process %d runs it.", pid)));
	else if (pid != 0)
	{
		set_wanted(m->id, "run");
		signal_at_commit(m->id, WAKE);
	}
	else if (next_step(m->method, m->steps_done, order.manual_cut_over) == NULL)
	{
		set_wanted(m->id, "run");
		notice_end(&order);
	}
	else
		resume_in_background(m);
	SPI_finish();
	PG_RETURN_INT64(id);
}
